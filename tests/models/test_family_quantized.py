"""A decoder read straight into few bits: the logits and adapter gradients of the rounded weights, in a fraction of the bytes."""

import functools

import jax
import numpy as np
import pytest

from dplora_jax import lora, losses, models
from dplora_jax.models import quantized
from dplora_jax.models.decoder import Decoder
from dplora_jax.privacy import clipping
from tests.compilation import jit
from tests.conftest import GOLDEN

pytestmark = pytest.mark.usefixtures("quick_compile")
LLAMA = GOLDEN / "llama_tiny"
apply = jit(Decoder.apply, static_argnums=0)


@functools.cache
def load(kind=None):
    return models.from_pretrained(LLAMA, quantize=kind)


def rounded(params):
    """`params` with each quantised kernel as the float matrix that it stands for."""
    pick = quantized.is_quantized
    return jax.tree.map(lambda leaf: quantized.dequantize(leaf) if pick(leaf) else leaf, params, is_leaf=pick)


# Of the largest logit: a net as narrow and random as this one averages little of the rounding away.
@pytest.mark.parametrize(("kind", "distance"), [("int8", 0.04), ("nf4", 0.3)])
def test_logits_are_those_of_the_rounded_weights_and_near_the_references(kind, distance):
    model, params = load(kind)
    with np.load(LLAMA / "golden.npz") as file:
        batch, reference = {name: file[name] for name in ("input_ids", "attention_mask")}, file["logits"]
    kept = batch["attention_mask"] == 1
    logits = apply(model, params, batch)[kept]
    np.testing.assert_allclose(logits, apply(model, rounded(params), batch)[kept], atol=1e-4)
    error = np.abs(logits - reference[kept]).max() / np.abs(reference[kept]).max()
    assert distance / 10 < error < distance


def test_clipped_adapter_gradients_are_those_over_the_rounded_weights():
    model, params = load("nf4")
    adapter = lora.init(jax.random.key(0), model, params, lora.LoraConfig(2, 4, ("q", "down")))
    adapter = jax.tree.map(lambda x: x + 0.2 * np.random.default_rng(x.size).normal(size=x.shape), adapter)
    batch = {"input_ids": np.arange(14).reshape(2, 7)}

    def step(params):
        loss = losses.language_model(model, params)
        return jit(lambda adapter: clipping.clipped_grad_sum(loss, adapter, batch, 0.1))(adapter)

    (grad, norms, _), (expected, expected_norms, _) = step(params), step(rounded(params))
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-3)
    for ours, theirs in zip(jax.tree.leaves(grad), jax.tree.leaves(expected), strict=True):
        assert theirs.any()
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("kind", "bytes_a_number"), [("int8", 1 + 4 / 48), ("nf4", 1 / 2 + 2 / 48)])
def test_every_matrix_that_adapters_may_name_is_held_in_few_bytes_and_nothing_else_is_touched(kind, bytes_a_number):
    model, params = load()
    small_model, small = load(kind)
    assert small_model == model
    kernels = [small["layers"][target.path[0]]["kernel"] for target in model.targets.values()]
    assert all(map(quantized.is_quantized, kernels))
    wide = [kernel for kernel in kernels if kernel.inputs == 48]  # one scale for 48 inputs; down_proj has 80
    assert len(wide) == 6
    numbers = sum(3 * inputs * outputs for inputs, outputs in (t.shape for t in model.targets.values()) if inputs == 48)
    assert quantized.nbytes(wide) == numbers * bytes_a_number
    jax.tree.map(np.testing.assert_array_equal, small, quantized.quantize(params, model, kind))


def test_matrices_stored_the_other_way_round_are_quantised_alike():
    model, params = models.from_pretrained(GOLDEN / "variants/gpt2_inner")
    _, small = models.from_pretrained(GOLDEN / "variants/gpt2_inner", quantize="int8")
    assert all(quantized.is_quantized(small["layers"][target.path[0]]["kernel"]) for target in model.targets.values())
    jax.tree.map(np.testing.assert_array_equal, small, quantized.quantize(params, model, "int8"))


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="unknown kind 'int5' of quantisation; known: int8, nf4"):
        models.from_pretrained(LLAMA, quantize="int5")
