"""BERT against transformers' own logits, and what attention, rows, precision and pooling mean."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import lora, models
from dplora_jax.models import layers
from dplora_jax.models.bert import Bert
from tests.conftest import GOLDEN

pytestmark = pytest.mark.usefixtures("quick_compile")
apply = jax.jit(Bert.apply, static_argnums=0)
prefix = jax.jit(Bert.prefix, static_argnums=(0, 3))


@pytest.fixture(scope="module")
def classifier():
    return load("bert_tiny_classifier")


@pytest.fixture(scope="module")
def mlm():
    return load("bert_tiny_mlm")


def load(name):
    model, params = models.from_pretrained(GOLDEN / name)
    with np.load(GOLDEN / name / "golden.npz") as file:
        batch = {key: value.astype(np.int32) for key, value in file.items() if key != "logits"}
        return model, params, batch, file["logits"]


def trained(model, params, config):
    rng = np.random.default_rng(0)
    adapter = lora.init(jax.random.key(0), model, params, config)
    return jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32), adapter)


def test_classifier_agrees_with_transformers(classifier):
    model, params, batch, logits = classifier
    np.testing.assert_allclose(apply(model, params, batch), logits, atol=2e-4)


def test_masked_language_model_agrees_with_transformers_on_attended_positions(mlm):
    model, params, batch, logits = mlm
    attended = batch["attention_mask"] == 1
    assert not attended.all()
    np.testing.assert_allclose(apply(model, params, batch)[attended], logits[attended], atol=2e-4)


def test_absent_inputs_mean_all_attended_first_segment_and_positions_in_order(mlm):
    model, params, batch, _ = mlm
    ids = batch["input_ids"]
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    said = {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids), "position_ids": positions}
    logits = apply(model, params, {"input_ids": ids})
    np.testing.assert_allclose(logits, apply(model, params, {"input_ids": ids, **said}), atol=2e-6)
    for other in ({"token_type_ids": np.ones_like(ids)}, {"position_ids": positions[:, ::-1]}):
        assert np.abs(logits - apply(model, params, {"input_ids": ids, **said, **other})).max() > 1e-3


def test_masked_tokens_change_no_logit_of_an_attended_one(classifier, mlm):
    for model, params, batch, _ in (classifier, mlm):
        mask = batch["attention_mask"]
        other = batch | {"input_ids": np.where(mask, batch["input_ids"], (batch["input_ids"] + 41) % 99)}
        before, after = (np.asarray(apply(model, params, b)) for b in (batch, other))
        attended = mask == 1 if before.ndim == 3 else slice(None)
        np.testing.assert_array_equal(before[attended], after[attended])


def test_the_gradient_with_respect_to_a_masked_token_is_zero(mlm):
    model, params, batch, _ = mlm
    batch = batch | {"token_type_ids": 1 - batch["attention_mask"]}  # segment 1 is for masked tokens alone

    def attended_logits(segment):
        embed = params["embed"] | {"segment": segment}
        logits = model.apply(params | {"embed": embed}, batch)
        return jnp.square(logits * batch["attention_mask"][..., None]).sum()

    grad = jax.jit(jax.grad(attended_logits))(params["embed"]["segment"])
    assert grad[0].any()
    assert not grad[1].any()


def test_rows_do_not_mix(mlm):
    model, params, batch, _ = mlm
    other = batch | {"input_ids": batch["input_ids"].copy()}
    other["input_ids"][1] = (other["input_ids"][1] + 17) % 99
    before, after = (np.asarray(apply(model, params, b)) for b in (batch, other))
    np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
    assert (before[1] != after[1]).any()


def test_a_nan_in_one_row_stays_there(classifier):
    model, params, batch, _ = classifier
    outside = batch["input_ids"].copy()
    outside[1, 1] = 10**6  # beyond the vocabulary: nan
    logits = np.asarray(apply(model, params, batch | {"input_ids": outside}))
    assert np.isnan(logits[1]).all()
    np.testing.assert_array_equal(logits[[0, 2]], apply(model, params, batch)[np.array([0, 2])])


def test_bfloat16_is_close_to_float32(classifier, mlm):
    for (model, params, batch, logits), name in zip((classifier, mlm), ("classifier", "mlm"), strict=True):
        small, small_params = models.from_pretrained(GOLDEN / f"bert_tiny_{name}", jnp.bfloat16)
        assert {leaf.dtype for leaf in jax.tree.leaves(small_params)} == {jnp.dtype(jnp.bfloat16)}
        low = apply(small, small_params, batch)
        assert low.dtype == jnp.float32
        exact = np.asarray(apply(model, params, batch))
        kept = batch["attention_mask"] == 1 if logits.ndim == 3 else slice(None)
        error = np.abs(np.asarray(low) - exact)[kept].max()
        assert 0 < error < 0.05 * np.abs(exact[kept]).max()


def test_vmap_over_batches_of_one_equals_the_batch(classifier):
    model, params, batch, _ = classifier
    singles = jax.tree.map(lambda x: x[:, None], batch)
    one = jax.jit(jax.vmap(lambda example: model.apply(params, example)))(singles)
    np.testing.assert_allclose(one[:, 0], apply(model, params, batch), atol=1e-5)


def test_the_gradient_is_the_slope(classifier):
    model, params, batch, _ = classifier
    adapter = trained(model, params, lora.LoraConfig(2, 2, ("all-linear",)))
    direction = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), adapter)
    value_and_grad = jax.jit(jax.value_and_grad(lambda a: jnp.square(model.apply(params, batch, a)).sum()))
    value = lambda a: value_and_grad(a)[0]  # noqa: E731
    grad = value_and_grad(adapter)[1]
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(jax.tree.leaves(grad), jax.tree.leaves(direction), strict=True))
    ahead, behind = (float(value(jax.tree.map(lambda a, d, s=s: a + s * d, adapter, direction))) for s in (1e-3, -1e-3))
    assert slope == pytest.approx((ahead - behind) / 2e-3, rel=0.02)


def test_rematerialisation_gives_the_same_values_and_gradients(classifier):
    model, params, batch, _ = classifier
    adapter = trained(model, params, lora.LoraConfig(2, 2))
    remat = Bert(dataclasses.replace(model.config, remat=True))

    def value_and_grad(model):
        return jax.jit(jax.value_and_grad(lambda a: jnp.square(model.apply(params, batch, a)).sum()))(adapter)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *map(value_and_grad, (model, remat))
    )


@pytest.mark.parametrize("normalize", [False, True])
def test_mean_pooling_by_hand(classifier, mlm, normalize):
    model, params, batch, _ = classifier
    pooled = Bert(dataclasses.replace(model.config, pooling="mean", normalize=normalize))
    identity = {"kernel": jnp.eye(48), "bias": jnp.zeros(48)}
    features = apply(pooled, params | {"head": identity}, batch)
    hidden = np.asarray(prefix(model, params, batch, 3), np.float64)
    for row, mask in enumerate(batch["attention_mask"]):
        expected = hidden[row, mask == 1].mean(0)
        if normalize:
            expected /= np.linalg.norm(expected)
        np.testing.assert_allclose(features[row], expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_a_row_of_padding_alone_has_finite_logits_and_gradients(classifier, pooling):
    model, params, batch, _ = classifier
    model = Bert(dataclasses.replace(model.config, pooling=pooling, normalize=True))
    adapter = trained(model, params, lora.LoraConfig(2, 2))
    empty = {name: np.zeros_like(value[:2]) for name, value in batch.items()}
    empty["attention_mask"][1] = 1

    def total(adapter):
        logits = model.apply(params, empty, adapter)
        return jnp.square(logits).sum(), logits

    grad, logits = jax.jit(jax.grad(total, has_aux=True))(adapter)
    assert np.isfinite(logits).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grad))


def test_adapting_the_last_layers_equals_a_full_adapter_that_is_zero_below(classifier):
    model, params, batch, _ = classifier
    top = trained(model, params, lora.LoraConfig(4, 8, last_layers=1))
    full = lora.init(jax.random.key(1), model, params, lora.LoraConfig(4, 8))
    pairs = {
        name: pair.replace(a=pair.a.at[2:].set(top["layers"][name].a), b=pair.b.at[2:].set(top["layers"][name].b))
        for name, pair in full["layers"].items()
    }
    whole = apply(model, params, batch, {"layers": pairs, "head": top["head"]})
    np.testing.assert_allclose(apply(model, params, batch, top), whole, atol=1e-6)
    assert np.abs(whole - apply(model, params, batch, {"head": top["head"]})).max() > 1e-3


def test_scanned_layers_equal_unrolled_ones(classifier, monkeypatch):
    model, params, batch, _ = classifier
    adapter = trained(model, params, lora.LoraConfig(4, 8, last_layers=2))
    results = []
    for unrolled in (3, 0):
        monkeypatch.setattr(layers, "SHALLOW", unrolled)
        results.append(jax.jit(lambda a: model.apply(params, batch, a))(adapter))
    np.testing.assert_allclose(*results, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 3])
def test_starting_above_a_prefix_equals_the_whole(classifier, depth):
    model, params, batch, _ = classifier
    hidden = prefix(model, params, batch, depth)
    above = dataclasses.replace(model, start=depth)
    rest = {"hidden": hidden, "attention_mask": batch["attention_mask"]}
    np.testing.assert_allclose(apply(above, params, rest), apply(model, params, batch), atol=1e-5)


def test_init_has_the_layout_of_a_checkpoint(classifier, mlm):
    for model, params, _, _ in (classifier, mlm):
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        assert jax.tree.structure(shapes) == jax.tree.structure(params)
        assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, params)
