"""Features centred and scaled by public text: the same functions, in coordinates that private gradients say more in."""

import jax
import numpy as np
import pytest

from dplora_jax.models import bert, features

pytestmark = pytest.mark.usefixtures("quick_compile")
CONFIG = bert.BertConfig(
    vocab_size=11,
    width=8,
    num_layers=2,
    num_heads=2,
    mlp_width=16,
    max_positions=8,
    num_segments=2,
    num_labels=3,
    pooling="mean",
)


@pytest.fixture
def drawn():
    """(pooled [20, 8], far from 0; a head)."""
    rng = np.random.default_rng(0)
    pooled = (3 + rng.normal(size=(20, 8))).astype(np.float32)
    return pooled, {
        "kernel": rng.normal(size=(8, 3)).astype(np.float32),
        "bias": rng.normal(size=3).astype(np.float32),
    }


def logits(pooled, head):
    return pooled @ np.asarray(head["kernel"]) + np.asarray(head["bias"])


def test_measured_features_have_mean_zero_and_the_norm_that_was_asked_for(drawn):
    found = features.measure(drawn[0], 8.0)
    made = np.asarray(features.prepared(drawn[0], {features.KEY: found}))
    np.testing.assert_allclose(made.mean(0), 0, atol=1e-5)
    assert np.sqrt(np.square(made).sum(1).mean()) == pytest.approx(8)
    np.testing.assert_array_equal(features.prepared(drawn[0], {}), drawn[0])


def test_a_head_means_the_same_inward_and_outward_again(drawn):
    pooled, head = drawn
    found = features.measure(pooled, 8.0)
    inner = features.inward(head, found)
    made = np.asarray(features.prepared(pooled, {features.KEY: found}))
    np.testing.assert_allclose(logits(made, inner), logits(pooled, head), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        logits(pooled, features.outward(inner, found)), logits(pooled, head), rtol=1e-4, atol=1e-4
    )


def test_features_that_are_all_alike_are_refused():
    with pytest.raises(ValueError, match="alike"):
        features.measure(np.full((5, 8), 2.5, np.float32), 8.0)


def test_a_classifier_reads_its_features_prepared():
    model = bert.Bert(CONFIG)
    params = jax.jit(lambda key: jax.tree.map(lambda p: 4 * p, model.init(key)))(jax.random.key(0))
    apply = jax.jit(model.apply)
    batch = {
        "input_ids": np.arange(20, dtype=np.int32).reshape(4, 5) % 11,
        "attention_mask": np.arange(5) < np.array([[5], [4], [3], [5]]),
    }
    pooled = np.asarray(jax.jit(model.features)(params, batch))
    np.testing.assert_allclose(apply(params, batch), logits(pooled, params["head"]), rtol=1e-4, atol=1e-4)
    found = features.measure(pooled, 4.0)
    centred = params | {features.KEY: found}
    made = (pooled - found["center"]) * found["scale"]
    np.testing.assert_allclose(apply(centred, batch), logits(made, params["head"]), rtol=1e-4, atol=1e-4)
    inner = centred | {"head": features.inward(params["head"], found)}
    np.testing.assert_allclose(apply(inner, batch), apply(params, batch), rtol=1e-4, atol=1e-4)
