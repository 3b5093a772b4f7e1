"""A model in GGUF, written as llama.cpp's converter writes its architecture, has the logits of the original."""

import json

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy

from dplora_jax import models
from dplora_jax.errors import InputError
from tests.conftest import GOLDEN

pytestmark = pytest.mark.usefixtures("quick_compile")
FOLDER = GOLDEN / "families"
SIZES = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window", "attention.key_length": "head_dim", "attention.value_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip
CASES = {  # golden folder: llama.cpp's architecture
    "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3", "phi3": "phi3", "phi3_long": "phi3", "phi3_short": "phi3",
    "olmo2": "olmo2", "llama_yarn": "llama",
}  # fmt: skip


def convert(name, path, added=(), **metadata):
    """The golden folder as a GGUF file: norms of Gemma one larger, Llama's queries and keys in its own order. `added`, a dict
    by llama.cpp's names, is added to what is written."""
    hf, architecture = json.loads((FOLDER / name / "config.json").read_text()), CASES[name]
    writer = gguf.GGUFWriter(path, architecture)
    values = {key: hf[theirs] for key, theirs in SIZES.items() if hf.get(theirs) is not None} | metadata
    for key, value in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key if key.startswith("tokenizer.") else f"{architecture}.{key}", value)
    kind = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    names = gguf.get_tensor_name_map(kind, hf["num_hidden_layers"])
    for tensor, value in safetensors.numpy.load_file(FOLDER / name / "model.safetensors").items():
        if architecture.startswith("gemma") and tensor.endswith("norm.weight"):
            value = value + 1
        if architecture == "llama" and (".q_proj" in tensor or ".k_proj" in tensor):
            halves = value.reshape(-1, 2, hf["head_dim"] // 2, value.shape[1])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        stored = names.get_name(tensor, (".weight", ".bias"))
        writer.add_tensor(stored, value + added[stored] if stored in added else value)
    for which, factors in (hf.get("rope_parameters") or {}).items():
        if which in ("long_factor", "short_factor"):
            writer.add_tensor(f"rope_factors_{which.split('_')[0]}.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# What the converter writes of rotary positions; the attention's scale is llama.cpp's own knowledge.
ROPE = {
    "gemma3": {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    "phi3": {"rope.dimension_count": 8, "rope.scaling.original_context_length": 64},
    "phi3_long": {
        "rope.dimension_count": 4, "rope.scaling.original_context_length": 8, "rope.freq_base": 500.0,
        "rope.scaling.attn_factor": float(np.sqrt(1 + np.log(8) / np.log(8))),
    },
    "phi3_short": {
        "rope.dimension_count": 4, "rope.scaling.original_context_length": 16, "rope.freq_base": 500.0,
        "rope.scaling.attn_factor": float(np.sqrt(1 + np.log(4) / np.log(16))),
    },
}  # fmt: skip


def differs(name, path):
    model, params = models.from_pretrained(path)
    with np.load(FOLDER / name / "golden.npz") as file:
        batch, logits = {key: file[key] for key in ("input_ids", "attention_mask")}, file["logits"]
    ours = np.asarray(jax.jit(model.apply)(params, batch))
    return np.abs(ours - logits)[batch["attention_mask"] == 1].max()


@pytest.mark.parametrize("name", [name for name in CASES if "gemma" not in name and "yarn" not in name])
def test_a_converted_model_has_the_logits_of_the_original(name, tmp_path):
    assert differs(name, convert(name, tmp_path / "m.gguf", **ROPE.get(name, {}))) < 2e-4


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_a_converted_gemma_has_the_logits_of_the_original(name, tmp_path, monkeypatch):
    from dplora_jax.models import gemma

    # What no file says, as it is the same in all published sizes, and is not in the reference values.
    unsaid = {"query_pre_attn_scalar": 20, "sliding_window_pattern": {"gemma2": 2, "gemma3": 3}[name]}
    read = gemma.from_config
    monkeypatch.setattr(gemma, "from_config", lambda hf, labels: read(hf | unsaid, labels))
    assert differs(name, convert(name, tmp_path / "m.gguf", **ROPE.get(name, {}))) < 2e-4


def test_yarn_is_read_and_what_it_does_not_say_is_refused(tmp_path):
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    plain = models.from_pretrained(convert("llama_yarn", tmp_path / "m.gguf", **yarn, **{"rope.freq_base": 500.0}))[0]
    theirs = models.from_pretrained(FOLDER / "llama_yarn")[0]
    np.testing.assert_allclose(plain.config.rope.frequencies, theirs.config.rope.frequencies, rtol=1e-6)
    assert plain.config.rope.scale == pytest.approx(1 + 0.1 * np.log(4))
    path = convert("llama_yarn", tmp_path / "n.gguf", **yarn, **{"rope.scaling.yarn_log_multiplier": 0.1})
    with pytest.raises(InputError, match="yarn_log_multiplier is not supported"):
        models.from_pretrained(path)


@pytest.mark.parametrize("layers", [46, 26])
def test_the_scale_of_a_gemma_is_that_of_its_published_size(layers, tmp_path):
    from dplora_jax.models import gemma, gguf_header

    path = convert("gemma2", tmp_path / "m.gguf", block_count=layers)
    common = {"num_hidden_layers": layers, "hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128}
    document = gemma._document(gguf_header.Header(path), common)
    assert document["query_pre_attn_scalar"] == {46: 144, 26: 128}[layers]


def test_an_olmo_3_and_a_gpt_neox_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"olmo2\.attention\.sliding_window=4 is not supported"):
        models.from_pretrained(convert("olmo2", tmp_path / "m.gguf", **{"attention.sliding_window": 4}))
    path = tmp_path / "n.gguf"
    writer = gguf.GGUFWriter(path, "gptneox")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="'gptneox' is not supported"):
        models.from_pretrained(path)
