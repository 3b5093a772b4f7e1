"""A GGUF file's header made by an enemy is one sentence, within seconds and bounded memory."""

import contextlib
import struct

import numpy as np
import pytest

from dplora_jax.errors import InputError
from dplora_jax.models import gguf_file, gguf_reader
from tests.models.gguf_writing import BYTE_LEVEL, SENTENCEPIECE, TENSORS, WIDTH, write


def refusal(call, *args):
    """The one sentence with which `call` is refused."""
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def text(content):
    return struct.pack("<Q", len(content)) + content


def head(tensors, keys):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


HEADERS = {
    "keys": head(0, 2**63),
    "tensors": head(2**63, 0),
    "a text": head(0, 1) + struct.pack("<Q", 2**33),
    "a value": head(0, 1) + text(b"a") + struct.pack("<IQ", 8, 2**33),
    "numbers": head(0, 1) + text(b"a") + struct.pack("<IIQ", 9, 0, 2**33),
    "more numbers": head(0, 1) + text(b"a") + struct.pack("<IIQ", 9, 0, 2**60),
    "texts": head(0, 1) + text(b"a") + struct.pack("<IIQ", 9, 8, 2**30),
    "an array of arrays": head(0, 1) + text(b"a") + struct.pack("<IIQ", 9, 9, 5),
    "axes": head(1, 0) + text(b"output.weight") + struct.pack("<I", 2**32 - 1),
    "no UTF-8": head(0, 1) + text(b"\xff\xfe"),
    "an alignment": head(0, 1) + text(b"general.alignment") + struct.pack("<IQ", 10, 2**63),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_hostile_header_is_one_sentence_whatever_the_files_length(tmp_path, content):
    path = tmp_path / "m.gguf"
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(20 << 30)  # takes no room on the disk
    refusal(gguf_file.config, path)


def test_the_items_of_a_header_are_bounded_all_together():
    arrays = [text(b"%d" % i) + struct.pack("<IIQ", 9, 0, 2**20) + bytes(2**20) for i in range(5)]
    assert len(gguf_reader.Reader(b"".join(arrays[:3]), 0).metadata(3)) == 3
    with pytest.raises(ValueError, match="too many items"):
        gguf_reader.Reader(b"".join(arrays), 0).metadata(5)


def test_the_bytes_of_a_header_are_bounded():
    content = bytes(gguf_reader.MOST_BYTES + 8)
    gguf_reader.Reader(content, gguf_reader.MOST_BYTES - 8).unpack("Q")
    with pytest.raises(ValueError, match="too long"):
        gguf_reader.Reader(content, gguf_reader.MOST_BYTES - 7).unpack("Q")


def test_a_name_that_stands_twice_is_damage():
    key = text(b"a") + struct.pack("<II", 4, 1)
    assert gguf_reader.Reader(key, 0).metadata(1) == {"a": 1}
    with pytest.raises(ValueError, match="twice"):
        gguf_reader.Reader(key + key, 0).metadata(2)


def test_tensors_that_share_bytes_are_damage(tmp_path):
    path = write(tmp_path / "m.gguf")
    content = path.read_bytes()
    name = b"blk.1.attn_norm.weight"
    described = name + struct.pack("<IQI", 1, WIDTH, 0)
    at = content.index(described) + len(described)
    assert content.count(described) == 1
    path.write_bytes(content[:at] + struct.pack("<Q", 0) + content[at + 8 :])  # where token_embd.weight lies
    assert "begins within another" in refusal(gguf_file.config, path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("tokens", 5), ("tokens", "ab"), ("token_type", 5), ("token_type", "ab"), ("merges", 5), ("scores", 5), ("scores", ["a"]),
     ("eos_token_id", "a"), ("model", 5), ("tokens", [1, 2])],
)  # fmt: skip
@pytest.mark.parametrize("kind", [BYTE_LEVEL, SENTENCEPIECE], ids=["gpt2", "llama"])
def test_a_tokenizers_metadata_of_another_kind_are_one_sentence_or_harmless(tmp_path, kind, key, value):
    keys = {f"tokenizer.ggml.{name}": stored for name, stored in (kind | {key: value}).items()}
    path = write(tmp_path / "m.gguf", {}, **keys)
    for call in (gguf_file.tokenizer, gguf_file.config):
        with contextlib.suppress(InputError):
            call(path)


def test_a_token_as_long_as_a_book_is_one_sentence(tmp_path):
    added = {"tokens": ["x" * 10**6], "scores": [-1.0], "token_type": [1]}
    keys = {
        f"tokenizer.ggml.{name}": stored + added.get(name, [])
        for name, stored in SENTENCEPIECE.items()
        if name != "model"
    }
    path = write(tmp_path / "m.gguf", {}, **keys, **{"tokenizer.ggml.model": "llama"})
    assert "more than 512 characters" in refusal(gguf_file.tokenizer, path)


def test_the_tensors_of_a_sound_file_share_no_bytes(tmp_path):
    with gguf_file.GgufCheckpoint(write(tmp_path / "m.gguf")) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("model.norm.weight"), TENSORS["output_norm.weight"])
