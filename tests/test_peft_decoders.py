"""Adapters of decoders: PEFT's own files give PEFT's logits and gradients, and what we write is what PEFT and we read."""

import functools
import json
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from dplora_jax import lora, losses, models, peft
from dplora_jax.errors import InputError
from dplora_jax.models.decoder import Decoder
from dplora_jax.privacy import clipping
from tests.compilation import jit
from tests.conftest import GOLDEN, mostly_slow

pytestmark = pytest.mark.usefixtures("quick_compile")
LANGUAGE = ("peft_llama_tiny", "peft_gpt2_tiny", "peft_gpt2_all", "peft_llama_all")
CLASSIFIER = "peft_llama_seqcls"
written_by_peft = pytest.mark.parametrize("name", [*LANGUAGE, CLASSIFIER])


@functools.cache
def load(name):
    """(model, params, adapter, LoraConfig, reference values) of a folder that PEFT wrote."""
    model, params = models.from_pretrained(GOLDEN / name / "base")
    with np.load(GOLDEN / name / "golden.npz") as file:
        return model, params, *peft.load(GOLDEN / name / "adapter", model, params), dict(file)


def batch_of(golden):
    return {name: golden[name].astype(np.int32) for name in ("input_ids", "attention_mask")}


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)  # the scales are part of the structure
    jax.tree.map(np.testing.assert_array_equal, left, right)


@written_by_peft
def test_an_adapter_written_by_peft_gives_its_logits(name):
    model, params, adapter, _, golden = load(name)
    logits = jit(Decoder.apply, static_argnums=0)(model, params, batch_of(golden), adapter)
    kept = golden["attention_mask"] == 1 if logits.ndim == 3 else slice(None)
    np.testing.assert_allclose(logits[kept], golden["logits"][kept], atol=5e-5)


CLIPPED = [
    *(("peft_llama_tiny", "broadcast"), ("peft_gpt2_tiny", "ghost"), ("peft_llama_tiny", "ghost")),
    *((name, form) for name in ("peft_gpt2_all", "peft_llama_all") for form in clipping.FORMS),
]
# The forms agree with each other on every family (tests/privacy/test_clipping_families.py); one of them, with PyTorch.
FAST = [("peft_gpt2_all", "ghost"), ("peft_llama_all", "auto")]


@pytest.mark.parametrize(("name", "form"), mostly_slow(FAST, CLIPPED))
def test_losses_norms_and_clipped_gradients_are_those_of_pytorch(name, form):
    model, params, adapter, config, golden = load(name)
    loss, clip_norm = losses.language_model(model, params), float(golden["clip_norm"])
    assert golden["per_example_grad_norm"].max() > clip_norm
    step = jit(lambda adapter, batch: clipping.clipped_grad_sum(loss, adapter, batch, clip_norm, form=form))
    grad, norms, per_row = step(adapter, batch_of(golden))
    np.testing.assert_allclose(per_row, golden["per_example_loss"], atol=5e-6)
    np.testing.assert_allclose(norms, golden["per_example_grad_norm"], rtol=5e-5)
    ours = peft.to_state_dict(model, grad, config)
    theirs = safetensors.numpy.load_file(GOLDEN / name / "clipped_grad_sum.safetensors")
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        np.testing.assert_allclose(ours[tensor], value, atol=1e-5)


@written_by_peft
def test_we_write_the_tensors_and_options_that_peft_writes(name, tmp_path):
    model, params, adapter, config, _ = load(name)
    peft.save(tmp_path, model, adapter, config)
    files = [directory / "adapter_model.safetensors" for directory in (tmp_path, GOLDEN / name / "adapter")]
    ours, theirs = map(safetensors.numpy.load_file, files)
    assert_same(ours, theirs)
    assert ("base_model.model.score.weight" in ours) == (name == CLASSIFIER)  # whose head has no bias
    ours, theirs = (json.loads(file.with_name("adapter_config.json").read_text()) for file in files)
    # PEFT spells out the modules of "all-linear", and lists a second name of heads.
    for option in ours.keys() - {"modules_to_save", "target_modules"}:
        assert ours[option] == theirs[option], option
    assert ours["fan_in_fan_out"] == ("gpt2" in name)
    assert ours["task_type"] == ("SEQ_CLS" if name == CLASSIFIER else "CAUSAL_LM")
    assert ours["modules_to_save"] == (["score"] if name == CLASSIFIER else None)
    assert_same(peft.load(tmp_path, model, params), (adapter, config))


BASES = {  # checkpoints, and the matrix that q, k and v are together
    "variants/gpt2_untied": "c_attn",
    "llama_tiny": None,
    "chatglm_tiny": "query_key_value",
    "chatglm2_tiny": "query_key_value",
    "variants/qwen2_classifier": None,
}
bases = pytest.mark.parametrize("base", BASES)
load_base = functools.cache(lambda base: models.from_pretrained(GOLDEN / base))


def random_adapter(model, params, config):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: lora.init(jax.random.key(0), model, params, config))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@pytest.mark.parametrize(
    "config", [lora.LoraConfig(3, 5, ("q", "k", "v")), lora.LoraConfig(2, 1.5, ("all-linear",), 1)]
)
@bases
def test_loading_what_was_saved_gives_it_back_exactly(base, config, tmp_path):
    model, params = load_base(base)
    adapter = random_adapter(model, params, config)
    assert ("head" in adapter) == ("classifier" in base)
    peft.save(tmp_path, model, adapter, config)
    loaded, read = peft.load(tmp_path, model, params)
    assert_same(loaded, adapter)
    assert (read.rank, read.alpha, read.last_layers) == (config.rank, config.alpha, config.last_layers)
    assert lora.resolve_targets(model, read.targets) == lora.resolve_targets(model, config.targets)


@bases
def test_query_key_and_value_name_a_fused_matrix_once(base):
    model, _ = load_base(base)
    fused, chosen = BASES[base], lora.resolve_targets(model, ("q", "k", "v"))
    assert chosen.keys() == ({fused} if fused else {"q_proj", "k_proj", "v_proj"})
    if fused:
        assert all(lora.resolve_targets(model, (alias,)) == chosen for alias in ("q", "k", "v", fused))


@pytest.mark.parametrize("last_layers", [None, 1])
@bases
def test_target_modules_select_exactly_the_adapted_matrices(base, last_layers, tmp_path):
    model, params = load_base(base)
    tensors = safetensors.numpy.load_file(GOLDEN / base / "model.safetensors")
    modules = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
    for targets in (("q",), ("o",), ("down",), ("up",), ("o", "down"), ("q", "k", "v"), ("all-linear",)):
        config = lora.LoraConfig(2, 4, targets, last_layers)
        adapter = random_adapter(model, params, config)
        peft.save(tmp_path, model, adapter, config)
        document = json.loads((tmp_path / "adapter_config.json").read_text())
        names = peft.to_state_dict(model, adapter, config)
        adapted = {name.removeprefix(peft.PREFIX).split(".lora_")[0] for name in names if ".lora_" in name}
        assert len(adapted) == len(lora.resolve_targets(model, targets)) * (last_layers or model.config.num_layers)
        assert selected_by_peft(document, modules) == adapted


def selected_by_peft(document, modules):
    """The modules that PEFT adapts for an adapter_config.json: its rule, as of version 0.21."""
    targets, layers = document["target_modules"], document["layers_to_transform"]
    if isinstance(targets, str):
        assert layers is None  # PEFT refuses both together
        return {name for name in modules if re.fullmatch(targets, name)}
    chosen = {name for name in modules if any(name == t or name.endswith("." + t) for t in targets)}
    if layers is None:
        return chosen
    return {name for name in chosen if (found := re.match(r".*\.[^.]*\.(\d+)\.", name)) and int(found[1]) in layers}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["score", "embed_tokens"]),
        ("modules_to_save", ["lm_head"]),
    ],
)
@pytest.mark.parametrize("name", ["peft_gpt2_all", CLASSIFIER])
def test_what_is_not_implemented_is_refused_by_name(name, option, value, tmp_path):
    model, params, *_ = load(name)
    shutil.copytree(GOLDEN / name / "adapter", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {option: value}))
    with pytest.raises(InputError, match=rf"{option}=.*not supported.*\.$"):
        peft.load(tmp_path, model, params)


def test_another_familys_adapter_is_refused():
    model, params = load_base("llama_tiny")
    with pytest.raises(InputError, match=r"transformer\.h\.0\.attn\.c_attn.* has no place in this model\.$"):
        peft.load(GOLDEN / "peft_gpt2_tiny" / "adapter", model, params)


def test_a_head_with_another_number_of_labels_is_refused():
    model, params, *_ = load(CLASSIFIER)
    with pytest.raises(InputError, match="number of labels"):
        peft.load(GOLDEN / CLASSIFIER / "adapter", model, params | {"head": {"kernel": np.zeros((32, 4))}})
