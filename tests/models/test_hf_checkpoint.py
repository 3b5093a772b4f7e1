"""What is written is what was read: names, shapes and bytes, in one file or in shards, and what each reader is told."""

import json
import math
import struct
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from dplora_jax import models, peft
from dplora_jax.errors import InputError
from dplora_jax.models import gguf_file, hf_checkpoint, quantized
from dplora_jax.models.hf_checkpoint import Tensor
from experiments import export
from tests import exported
from tests.conftest import GOLDEN
from tests.models import gguf_writing

pytestmark = pytest.mark.usefixtures("quick_compile")
SOURCES = (
    "variants/gpt2_untied", "variants/gpt2_classifier", "gpt2_tiny", "variants/llama_biases", "variants/llama_sharded",
    "variants/qwen2_classifier", "variants/mistral_window", "bert_tiny_mlm", "bert_tiny_classifier", "chatglm_tiny",
    "chatglm2_tiny",
)  # fmt: skip


def config_of(source):
    return json.loads((GOLDEN / source / "config.json").read_text())


def save(source, directory, dtype=jnp.float32, labels=None, **options):
    """Read the reference `source` and write it again -> (model, params)."""
    model, params = models.from_pretrained(GOLDEN / source, dtype)
    hf = config_of(source)
    document = hf_checkpoint.config(model, hf, labels, hf.get("pad_token_id"))
    hf_checkpoint.save(directory, model, params, document, GOLDEN / source, **options)
    return model, params


def tensors_of(directory):
    found = {}
    for path in directory.glob("model*.safetensors"):
        found |= safetensors.numpy.load_file(path)
    return found


def vector(name, *values, dtype=np.float32):
    return Tensor(name, (len(values),), np.dtype(dtype), lambda: np.array(values, dtype))


@pytest.mark.parametrize("source", SOURCES)
def test_writing_what_was_read_gives_the_sources_names_shapes_bytes_and_config(source, tmp_path):
    save(source, tmp_path)
    before, after = tensors_of(GOLDEN / source), tensors_of(tmp_path)
    assert set(after) == set(before)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name, strict=True)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    document = json.loads((tmp_path / "config.json").read_text())
    assert document.pop("problem_type", "single_label_classification") == "single_label_classification"
    assert document.pop("dtype") == "float32"
    assert document == {name: value for name, value in config_of(source).items() if name != "dtype"}


def test_shards_hold_no_more_than_asked_and_are_read_as_one(tmp_path):
    model, params = save("bert_tiny_classifier", tmp_path, shard_bytes=50_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 4
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    sizes = {file: sum(t.nbytes for t in safetensors.numpy.load_file(tmp_path / file).values()) for file in files}
    assert max(sizes.values()) <= 50_000
    assert index["metadata"]["total_size"] == sum(sizes.values()) == quantized.nbytes(params)
    for file in files:
        names = set(safetensors.numpy.load_file(tmp_path / file))
        assert names == {name for name, place in index["weight_map"].items() if place == file}
    again, read = models.from_pretrained(tmp_path)
    assert again == model
    np.testing.assert_array_equal(read["head"]["kernel"], params["head"]["kernel"])


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    hf_checkpoint.write(tmp_path, [vector("a", *range(9)), vector("b", 1), vector("c", *range(9))], shard_bytes=8)
    placed = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(placed.values())) == len(list(tmp_path.glob("*.safetensors"))) == 3


def test_no_two_tensors_are_in_memory_at_once(tmp_path):
    made = []

    def read():
        assert all(ref() is None for ref in made)
        value = np.ones(3, np.float32)
        made.append(weakref.ref(value))
        return value

    hf_checkpoint.write(tmp_path, [Tensor(name, (3,), np.dtype(np.float32), read) for name in "abc"])
    assert len(made) == 3


def test_every_tensor_starts_at_a_multiple_of_its_items(tmp_path):
    hf_checkpoint.write(tmp_path, [vector("half", 1, 2, 3, dtype=np.float16), vector("single", 4, 5)])
    data = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header["single"]["data_offsets"][0] % 4 == 0
    assert safetensors.numpy.load_file(tmp_path / "model.safetensors")["half"].tolist() == [1, 2, 3]


def test_bfloat16_is_written_as_such_and_read_back(tmp_path):
    _, params = save("variants/qwen2", tmp_path, jnp.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    _, read = models.from_pretrained(tmp_path, jnp.bfloat16)
    np.testing.assert_array_equal(read["layers"]["down_proj"]["kernel"], params["layers"]["down_proj"]["kernel"])


def test_a_base_in_few_bits_is_refused(tmp_path):
    model, params = models.from_pretrained(GOLDEN / "gpt2_tiny", quantize="nf4")
    with pytest.raises(InputError, match="cannot be exported"):
        hf_checkpoint.save(tmp_path, model, params, hf_checkpoint.config(model, config_of("gpt2_tiny")))
    assert list(tmp_path.iterdir()) == []


def test_the_classifiers_config_has_its_class_its_labels_and_the_pad_token():
    model, _ = models.from_pretrained(GOLDEN / "variants/qwen2", num_labels=2)
    hf = config_of("variants/qwen2") | {"torch_dtype": "bfloat16", "num_labels": 5}
    document = hf_checkpoint.config(model, hf, ("bad", "good"), 7)
    assert document["architectures"] == ["Qwen2ForSequenceClassification"]
    assert document["id2label"] == {0: "bad", 1: "good"}
    assert document["label2id"] == {"bad": 0, "good": 1}
    assert document["pad_token_id"] == 7
    assert document["dtype"] == "float32"
    assert document["problem_type"] == "single_label_classification"
    assert not {"torch_dtype", "num_labels"} & set(document)
    with pytest.raises(InputError, match="no pad token"):
        hf_checkpoint.config(model, hf, ("bad", "good"))


def test_a_checkpoint_turned_into_a_classifier_has_its_own_class():
    for source, name in {"gpt2_tiny": "GPT2", "llama_tiny": "Llama", "variants/mistral_window": "Mistral"}.items():
        for labels, kind in ((2, "SequenceClassification"), (None, "CausalLM")):
            model, _ = models.from_pretrained(GOLDEN / source, num_labels=labels)
            written = hf_checkpoint.config(model, config_of(source) | {"architectures": None}, pad_token_id=0)
            expected = "GPT2LMHeadModel" if (name, labels) == ("GPT2", None) else f"{name}For{kind}"
            assert written["architectures"] == [expected]


def divisors(factor, low, high, original, theta=500000.0, width=8):
    """Llama 3's divisors of each rotary frequency, by its paper's code."""
    out = []
    for i in range(width // 2):
        waves = original * theta ** (-2 * i / width) / (2 * math.pi)
        share = min(max((waves - low) / (high - low), 0), 1)
        out.append(1 / ((1 - share) / factor + share))
    return np.array(out, np.float32)


def test_a_gguf_files_llama_3_frequencies_get_the_name_that_transformers_knows(tmp_path):
    for number, (arguments, known) in enumerate((((8, 1, 4, 8192), True), ((8, 1, 4, 300), False))):
        tensors = gguf_writing.TENSORS | {"rope_freqs.weight": divisors(*arguments)}
        path = tmp_path / f"{number}.gguf"
        gguf_writing.write(path, tensors, **{"llama.rope.freq_base": 500000.0})
        model, params = models.from_pretrained(path)
        if not known:
            with pytest.raises(InputError, match="rope_freqs"):
                hf_checkpoint.config(model, gguf_file.config(path))
            continue
        document = hf_checkpoint.config(model, gguf_file.config(path))
        assert document["rope_scaling"]["rope_type"] == "llama3"
        hf_checkpoint.save(tmp_path, model, params, document, path)
        read, _ = models.from_pretrained(tmp_path)
        np.testing.assert_allclose(read.config.rope.frequencies, model.config.rope.frequencies, rtol=1e-6)


@pytest.mark.parametrize("labels", [None, 2])
def test_a_gguf_base_is_exported_with_its_tokenizer(labels, tmp_path):
    tokens = {f"tokenizer.ggml.{key}": value for key, value in gguf_writing.BYTE_LEVEL.items()}
    table = np.random.default_rng(0).normal(0, 0.3, (len(tokens["tokenizer.ggml.tokens"]), gguf_writing.WIDTH))
    tensors = gguf_writing.TENSORS | {"token_embd.weight": table.astype(np.float32)}
    path, out = gguf_writing.write(tmp_path / "base.gguf", tensors, **tokens), tmp_path / "out"
    model, params = models.from_pretrained(path, num_labels=labels)
    tree, config = exported.draw(0, model, params, exported.ALL), exported.ALL
    peft.save(tmp_path / "adapter", model, tree, config)
    assert export.main([f"--model={path}", f"--adapter={tmp_path / 'adapter'}", f"--out={out}"]) == 0
    ours, theirs = models.load_tokenizer(path), models.load_tokenizer(out)
    for text in gguf_writing.TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
    read, merged = models.from_pretrained(out)
    assert read.config.num_labels == labels
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == theirs.pad_token_id == 262
    batch = {"input_ids": np.array([[5, 6, 7, 8]], np.int32)}
    expected = jax.jit(model.apply)(params, batch, tree)
    np.testing.assert_allclose(jax.jit(read.apply)(merged, batch), expected, atol=1e-3, rtol=1e-4)
