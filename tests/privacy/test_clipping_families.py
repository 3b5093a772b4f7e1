"""Every clipping form on every model family, beside the definition (each example as a batch of one): with a row that is padding,
one that is short, and one whose gradient is not finite."""

import functools

import jax
import numpy as np
import pytest

from dplora_jax import lora, losses, models, peft
from dplora_jax.models import layers
from dplora_jax.privacy.clipping import clipped_grad_sum
from tests.conftest import GOLDEN, mostly_slow

pytestmark = pytest.mark.usefixtures("quick_compile")
FAMILIES = {  # and how many layers are unrolled at most
    "gpt2_tiny": 3, "variants/qwen2_classifier": 0, "llama_tiny": 0, "chatglm_tiny": 0, "chatglm2_tiny": 3, "bert_tiny_mlm": 0,
    **{f"families/{name}": 0 for name in ("roberta_classifier", "distilbert_classifier", "modernbert_classifier", "qwen3")},
    **{f"families/{name}": 0 for name in ("modernbert_mean", "gemma2", "gemma3", "gpt_neox", "phi3_long", "olmo3")},
}  # fmt: skip
FORMS = ("broadcast", "ghost")
TOKENS, PADDING, SHORT, POISONED = 7, 1, 2, 3
CLIP = 0.3


@functools.cache
def setup(name):
    """(loss, adapter on all matrices with random leaves, batch of five rows, weights)."""
    model, params = models.from_pretrained(GOLDEN / name)
    adapter = lora.init(jax.random.key(0), model, params, lora.LoraConfig(3, 6.0, ("all-linear",)))
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), adapter)
    ids = rng.integers(5, 40, (5, TOKENS)).astype(np.int32)
    mask = np.ones_like(ids)
    ids[PADDING], mask[PADDING], mask[SHORT, 3:] = 0, 0, 0
    ids[POISONED, 1:3] = 10**6  # beyond the vocabulary: nan
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.config.num_labels:
        batch["labels"] = np.arange(5, dtype=np.int32) % model.config.num_labels
    make = losses.classification if model.config.num_labels else losses.language_model
    return make(model, params), adapter, batch, np.array([1, 0, 1, 1, 0.5], np.float32)


@functools.cache
def run(name, form):
    loss, adapter, batch, weights = setup(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "SHALLOW", FAMILIES[name])
        step = jax.jit(lambda adapter, batch, weights: clipped_grad_sum(loss, adapter, batch, CLIP, weights, form))
        return jax.tree.map(np.array, step(adapter, batch, weights))


# "ghost" takes all that a family gives: inputs, cotangents, slots; "broadcast" is one and the same for all.
RUNS = [(name, form) for name in FAMILIES for form in FORMS]
FAST = [
    (name, "ghost") for name in ("gpt2_tiny", "llama_tiny", "chatglm_tiny", "families/gemma2")
]  # BERT's: test_clipping


@pytest.mark.parametrize(("name", "form"), mostly_slow(FAST, RUNS))
def test_a_form_agrees_with_the_definition(name, form):
    (grad, norms, rows), (expected, expected_norms, expected_rows) = run(name, form), run(name, "vmap")
    assert np.isinf(expected_norms[POISONED])
    assert expected_norms[PADDING] == 0
    assert (expected_norms[[0, 4]] > CLIP).any()
    np.testing.assert_allclose(norms, expected_norms, rtol=2e-4)
    counted = [0, SHORT, 4]
    np.testing.assert_allclose(rows[counted], expected_rows[counted], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * CLIP), grad, expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grad))


@pytest.mark.parametrize("name", mostly_slow([name for name, _ in FAST], FAMILIES))
def test_what_is_compared_is_no_zero(name):
    grad, _, _ = run(name, "vmap")
    total = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(grad)))
    assert 0.3 * CLIP < total <= 2.5 * CLIP


@pytest.mark.parametrize("form", ["broadcast", "ghost"])
def test_a_head_that_peft_trained_whole_is_clipped_as_the_definition_says(form):
    name = GOLDEN / "families/roberta_classifier"
    model, params = models.from_pretrained(name)
    adapter, _ = peft.load(name / "adapter", model, params)
    assert set(adapter["head"]) == {"dense", "kernel", "bias"}
    ids = np.random.default_rng(0).integers(3, 60, (3, TOKENS)).astype(np.int32)
    batch = {"input_ids": ids, "labels": np.arange(3, dtype=np.int32)}
    loss = losses.classification(model, params)
    sums = [
        jax.jit(lambda a, form=form: clipped_grad_sum(loss, a, batch, CLIP, form=form))(adapter)
        for form in (form, "vmap")
    ]
    np.testing.assert_allclose(sums[0][1], sums[1][1], rtol=2e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * CLIP), sums[0][0], sums[1][0])
    assert all(np.any(leaf) for leaf in jax.tree.leaves(sums[0][0]["head"]))
