"""An adapter's folder made by an enemy: it reads nothing outside itself, and every damage is one sentence."""

import json
import math
import shutil
import struct

import pytest

from dplora_jax import models, peft
from dplora_jax.errors import InputError
from experiments.export import loading
from tests.conftest import GOLDEN, mostly_slow

pytestmark = pytest.mark.usefixtures("quick_compile")
SOURCE = GOLDEN / "peft_gpt2_tiny"
WRONG = ("x", 5, [], {}, [1], {"a": 1}, True, None, -1, 10**400, math.nan, math.inf, [None], [[]], "z" * 10**6)


@pytest.fixture(scope="module")
def base():
    return models.from_pretrained(SOURCE / "base")


@pytest.fixture
def adapter(tmp_path):
    return shutil.copytree(SOURCE / "adapter", tmp_path / "adapter")


def refusal(call, *args):
    """The one sentence with which `call` is refused."""
    with pytest.raises(InputError) as caught:
        call(*args)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_reads_nothing_elsewhere(base, adapter, name):
    (adapter / name).rename(adapter.parent / name)
    (adapter / name).symlink_to(f"../{name}")
    assert "is a link" in refusal(peft.load, adapter, *base)


def test_the_folder_itself_may_be_a_link(base, adapter, tmp_path):
    (tmp_path / "current").symlink_to(adapter)
    peft.load(tmp_path / "current", *base)


@pytest.mark.parametrize("kind", mostly_slow((0, 5, 9), range(len(WRONG))))  # a text, an object, an endless number
def test_a_value_of_another_kind_is_one_sentence_or_harmless(base, adapter, kind):
    path, refused = adapter / "adapter_config.json", 0
    said = json.loads(path.read_text())
    for name in said:
        path.write_text(json.dumps(said | {name: WRONG[kind]}))
        try:
            peft.load(adapter, *base)
        except InputError:
            refused += 1
    assert refused > 3


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, 10**400, 1e300, True])
def test_an_alpha_that_is_no_number_of_float32_is_one_sentence(base, adapter, alpha):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": alpha}))
    assert "lora_alpha" in refusal(peft.load, adapter, *base)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"peft_type":' * 100_000, b"[]", b"\xff", b""],
)
def test_a_malformed_document_is_one_sentence(base, adapter, content):
    (adapter / "adapter_config.json").write_bytes(content)
    assert "adapter_config.json" in refusal(peft.load, adapter, *base)


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("F8_E4M3", [1], 1), ("F32", [2**40, 0], 0), ("F32", [], 4), ("I64", [1], 8), ("BOOL", [1], 1), ("C64", [1], 8)],
)
@pytest.mark.parametrize(
    "name", ["base_model.model.score.weight", "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"]
)
def test_a_tensor_of_another_kind_is_one_sentence(base, adapter, name, dtype, shape, size):
    header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    (adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    refusal(peft.load, adapter, *base)


EXPONENTIAL = ("(.|.)*!", "(.*)*!", "(.|.)" * 60 + "!", "(.?){60}!", ".*" * 30 + "!")


@pytest.mark.parametrize("pattern", EXPONENTIAL)
@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_takes_no_exponential_time(base, adapter, option, pattern):
    path = adapter / "adapter_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {option: {pattern: 4} if option.endswith("pattern") else pattern}))
    if option == "target_modules":
        refusal(peft.load, adapter, *base)
    else:
        peft.load(adapter, *base)


@pytest.mark.parametrize("pattern", ["(", "(?!x).*", "(a)\\1", "(" * 2000, "\ud800*"])
def test_a_pattern_that_is_not_read_is_one_sentence(base, adapter, pattern):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": pattern}))
    assert "not a regular expression" in refusal(peft.load, adapter, *base)


def test_an_empty_head_does_not_say_how_many_labels_an_export_has(adapter):
    header = json.dumps(
        {"base_model.model.score.weight": {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]}}
    ).encode()
    (adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "not a classifier's head" in refusal(loading.head_rows, adapter)
