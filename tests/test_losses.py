"""Per-example losses: hand-computed values, and rows that know nothing of each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import losses

RNG = np.random.default_rng(0)
LOGITS_BxTxV = RNG.normal(size=(3, 5, 7)).astype(np.float32)
IDS_BxT = RNG.integers(0, 7, (3, 5)).astype(np.int32)


class Constant:
    """A model whose logits are its parameters."""

    def apply(self, params, batch, adapter):
        return params + adapter


def nll(logits, target):
    """-log softmax(logits)[target] in float64."""
    logits = np.asarray(logits, np.float64)
    return np.log(np.exp(logits).sum()) - logits[target]


def by_hand(counted):
    """Each row's mean over the targets t whose `counted` [B, T] is 1, from position t - 1; 0 without targets."""
    rows = []
    for row in range(3):
        terms = [nll(LOGITS_BxTxV[row, t - 1], IDS_BxT[row, t]) for t in range(1, 5) if counted[row, t]]
        rows.append(np.mean(terms) if terms else 0)
    return rows


def test_classification_is_the_cross_entropy_of_each_label():
    logits, labels = jnp.array([[0.0, 0.0], [jnp.log(3.0), 0.0]]), jnp.array([0, 1])
    loss = losses.classification(Constant(), logits)(0.0, {"labels": labels})
    np.testing.assert_allclose(loss, [np.log(2), np.log(4)], rtol=1e-6)


def test_classification_of_extreme_logits_is_finite():
    loss = losses.classification_of_logits(jnp.array([[1e4, -1e4]]), {"labels": jnp.array([1])})
    np.testing.assert_allclose(loss, [2e4])


def test_language_model_without_a_mask_averages_every_next_token():
    loss = losses.language_model(Constant(), LOGITS_BxTxV)(0.0, {"input_ids": IDS_BxT})
    np.testing.assert_allclose(loss, by_hand(np.ones((3, 5))), rtol=1e-5)


def test_language_model_averages_over_attended_targets():
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    batch = {"input_ids": IDS_BxT, "attention_mask": mask}
    loss = losses.language_model_of_logits(LOGITS_BxTxV, batch)
    np.testing.assert_allclose(loss, by_hand(mask), rtol=1e-5)


def test_loss_mask_chooses_the_targets_in_place_of_the_attention_mask():
    marked = np.array([[0, 0, 1, 0, 1], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]])
    batch = {"input_ids": IDS_BxT, "attention_mask": np.ones((3, 5), int), "loss_mask": marked}
    loss = losses.language_model_of_logits(LOGITS_BxTxV, batch)
    np.testing.assert_allclose(loss, by_hand(marked), rtol=1e-5)


@pytest.mark.parametrize("mask", ["attention_mask", "loss_mask"])
def test_a_row_without_targets_has_loss_zero_and_gradient_zero(mask):
    batch = {"input_ids": IDS_BxT, mask: np.array([[0] * 5, [1] * 5, [1, 0, 0, 0, 0]])}  # the first token is no target

    def total(logits):
        loss = losses.language_model_of_logits(logits, batch)
        return loss.sum(), loss

    grad, loss = jax.grad(total, has_aux=True)(jnp.asarray(LOGITS_BxTxV))
    assert loss[0] == 0
    assert loss[2] == 0
    assert not grad[0].any()
    assert not grad[2].any()
    assert grad[1].any()


@pytest.mark.parametrize("of_logits", [losses.language_model_of_logits, losses.classification_of_logits])
def test_rows_are_independent(of_logits):
    logits = jnp.asarray(LOGITS_BxTxV if of_logits is losses.language_model_of_logits else LOGITS_BxTxV[:, 0])
    batch = {"input_ids": IDS_BxT, "labels": IDS_BxT[:, 0]}
    jacobian = jax.jacobian(of_logits)(logits, batch)  # [B, B, ...]
    for loss_row in range(3):
        for logits_row in range(3):
            assert bool(jacobian[loss_row, logits_row].any()) == (loss_row == logits_row)


def test_losses_of_bfloat16_logits_are_float32():
    logits = jnp.asarray(LOGITS_BxTxV, jnp.bfloat16)
    assert losses.language_model_of_logits(logits, {"input_ids": IDS_BxT}).dtype == jnp.float32
    assert losses.classification_of_logits(logits[:, 0], {"labels": IDS_BxT[:, 0]}).dtype == jnp.float32
