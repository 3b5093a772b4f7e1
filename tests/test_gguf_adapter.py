"""An adapter as a GGUF file: added as llama.cpp adds it to the base's own GGUF file, it gives our logits."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest

from dplora_jax import gguf_adapter, lora, models
from dplora_jax.errors import InputError
from dplora_jax.lora import LoraConfig
from tests import exported
from tests.conftest import GOLDEN
from tests.models import gguf_writing
from tests.models.test_gguf_families import ROPE, convert

pytestmark = pytest.mark.usefixtures("quick_compile")
TOKENS = np.random.default_rng(1).integers(0, 12, (2, 7)).astype(np.int32)


def read(path):
    """What llama.cpp reads of an adapter: ({key: value}, {tensor: (A, B)}) of gguf's own reader."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    pairs = {name.removesuffix(".lora_a"): a for name, a in tensors.items() if name.endswith(".lora_a")}
    assert len(tensors) == 2 * len(pairs)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    return keys, {name: (a, tensors[f"{name}.lora_b"]) for name, a in pairs.items()}


def folded(path):
    """{tensor: what the adapter adds to it} by llama.cpp's formula (llama-adapter.h: get_scale)."""
    keys, pairs = read(path)
    assert (keys["general.type"], keys["adapter.type"]) == ("adapter", "lora")
    alpha = keys["adapter.lora.alpha"]
    scale = {name: alpha / b.shape[1] if alpha else 1.0 for name, (_, b) in pairs.items()}
    return {name: scale[name] * (b @ a) for name, (a, b) in pairs.items()}


def logits(model, params, adapter=None):
    return np.asarray(jax.jit(model.apply)(params, {"input_ids": TOKENS}, adapter))


def drawn(model, params, config):
    adapter = exported.draw(3, model, params, config)
    return {"layers": {t: dataclasses.replace(p, b=np.asarray(p.b)) for t, p in adapter["layers"].items()}}


@pytest.mark.parametrize("config", [LoraConfig(3, 6, ("all-linear",)), LoraConfig(2, 5, ("q", "down"), last_layers=1)])
def test_the_base_with_the_adapter_added_has_our_logits(config, tmp_path):
    base, path = gguf_writing.write(tmp_path / "base.gguf"), tmp_path / "adapter.gguf"
    model, params = models.from_pretrained(base)
    adapter = drawn(model, params, config)
    gguf_adapter.save(path, model, adapter, config, "llama", "owner/base", "for release")
    keys, pairs = read(path)
    assert keys["general.architecture"] == "llama"
    assert keys["general.description"] == "for release"
    assert keys["general.base_model.0.repo_url"] == "https://huggingface.co/owner/base"
    assert len(pairs) == (14 if config.last_layers is None else 2)
    tensors = dict(gguf_writing.TENSORS)
    for name, delta in folded(path).items():
        tensors[name] = tensors[name] + delta
    served = logits(*models.from_pretrained(gguf_writing.write(tmp_path / "both.gguf", tensors)))
    assert np.abs(served - logits(model, params)).max() > 0.1
    np.testing.assert_allclose(served, logits(model, params, adapter), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "phi3", "olmo2"])
def test_of_every_family_that_is_read_from_gguf(name, tmp_path, monkeypatch):
    from dplora_jax.models import gemma, pretrained

    if name == "gemma2":  # what no file says
        unsaid, from_config = {"query_pre_attn_scalar": 20, "sliding_window_pattern": 2}, gemma.from_config
        monkeypatch.setattr(gemma, "from_config", lambda hf, labels: from_config(hf | unsaid, labels))
    place, config = GOLDEN / "families" / name, LoraConfig(3, 6, ("all-linear",))
    model, params = models.from_pretrained(place)
    adapter, path = drawn(model, params, config), tmp_path / "adapter.gguf"
    gguf_adapter.save(path, model, adapter, config, pretrained.config(place)["model_type"])
    both = convert(name, tmp_path / "both.gguf", folded(path), **ROPE.get(name, {}))
    served = logits(*models.from_pretrained(both))
    assert np.abs(served - logits(model, params)).max() > 0.01
    np.testing.assert_allclose(served, logits(model, params, adapter), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(("place", "kind"), [("variants/gpt2_untied", "gpt2"), ("families/gpt_neox", "gpt_neox")])
def test_fused_matrices_lie_as_llama_cpps_converter_lays_them(place, kind, tmp_path):
    model, params = models.from_pretrained(GOLDEN / place)
    config, path = LoraConfig(3, 6, ("all-linear",)), tmp_path / "adapter.gguf"
    adapter = drawn(model, params, config)
    gguf_adapter.save(path, model, adapter, config, kind)
    added, c = folded(path), model.config
    architecture = {"gpt2": gguf.MODEL_ARCH.GPT2, "gpt_neox": gguf.MODEL_ARCH.GPTNEOX}[kind]
    names = gguf.get_tensor_name_map(architecture, c.num_layers)
    for target, pair in adapter["layers"].items():
        for layer in range(c.num_layers):
            ours = pair.scale * pair.b[layer] @ pair.a[layer]
            if target == "query_key_value":  # GPTNeoXModel.modify_tensors: each part of all heads, one after the other
                parts = ours.reshape(c.num_heads, 3, c.width // c.num_heads, c.width)
                ours = np.concatenate([parts[:, part].reshape(-1, c.width) for part in range(3)])
            name = names.get_name(model.targets[target].module.format(layer))
            np.testing.assert_allclose(added.pop(f"{name}.weight"), ours, rtol=1e-5, atol=1e-6)
    assert not added


def test_a_matrix_of_another_scale_and_an_alpha_of_zero_keep_their_meaning(tmp_path):
    model, params = models.from_pretrained(gguf_writing.write(tmp_path / "base.gguf"))
    path, config = tmp_path / "adapter.gguf", LoraConfig(2, 8, ("v", "down"))
    pairs = drawn(model, params, config)["layers"]
    pairs["v_proj"] = dataclasses.replace(pairs["v_proj"], scale=0.5)
    gguf_adapter.save(path, model, {"layers": pairs}, config, "llama")
    for target, name in {"v_proj": "attn_v", "down_proj": "ffn_down"}.items():
        ours = pairs[target].scale * pairs[target].b[0] @ pairs[target].a[0]
        np.testing.assert_allclose(folded(path)[f"blk.0.{name}.weight"], ours, rtol=1e-5, atol=1e-6)
    still = LoraConfig(2, 0, ("v", "down"))
    gguf_adapter.save(path, model, drawn(model, params, still), still, "llama")
    assert not any(np.any(delta) for delta in folded(path).values())


def test_what_a_gguf_adapter_cannot_hold_is_refused():
    decoder = models.from_pretrained(GOLDEN / "llama_tiny")[0]
    gguf_adapter.check(decoder, "mistral")
    with pytest.raises(InputError, match="no place for a classification head"):
        gguf_adapter.check(models.from_pretrained(GOLDEN / "bert_tiny_classifier")[0], "bert")
    for kind in ("chatglm", "bert", "modernbert"):
        with pytest.raises(
            InputError, match=rf"of model_type='{kind}' cannot be written; known: .*gpt2, gpt_neox, llama"
        ):
            gguf_adapter.check(decoder, kind)
    assert {kind for kind in models.registry.FAMILIES if models.registry.architecture(kind)} >= {"gemma3_text", "olmo3"}


def test_a_frozen_a_is_written_too(tmp_path):
    base, path, config = gguf_writing.write(tmp_path / "base.gguf"), tmp_path / "a.gguf", LoraConfig(2, 4)
    model, params = models.from_pretrained(base)
    params, adapter = lora.freeze_a(params, lora.init(jax.random.key(0), model, params, config))
    gguf_adapter.save(path, model, lora.with_frozen(params, adapter), config, "llama")
    assert all(np.any(a) for a, _ in read(path)[1].values())
