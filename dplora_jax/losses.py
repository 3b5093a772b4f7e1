"""Per-example losses over a model. Letters: B rows, T tokens, V vocabulary."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True, eq=False)
class ModelLoss:
    """`loss(adapter, batch) -> [B]` that hands the adapter to `model.apply` and does nothing else with it.

    That is what the fast clipping forms need: row i's loss depends on row i alone, and the adapter enters by
    `lora.linear` only.
    """

    model: Any
    params: Any
    of_logits: Callable

    def __call__(self, adapter, batch):
        return self.of_logits(self.model.apply(self.params, batch, adapter), batch)


def classification(model, params):
    """Cross-entropy of a classifier: a ModelLoss whose batches carry `labels` [B] int32; losses float32, in nats."""
    return ModelLoss(model, params, classification_of_logits)


def language_model(model, params):
    """Mean next-token cross-entropy of each row over its attended targets, in nats: a ModelLoss.

    Batches may carry `loss_mask` [B, T]: then only the tokens that it marks are targets. A row without targets has loss 0.
    """
    return ModelLoss(model, params, language_model_of_logits)


def classification_of_logits(logits_BxV, batch):
    """Cross-entropy of `labels` [B] -> [B] float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxV.astype(jnp.float32), batch["labels"])


def language_model_of_logits(logits_BxTxV, batch):
    """Mean cross-entropy over the targets of each row -> [B] float32: token t+1 is predicted at position t."""
    targets_BxT = batch["input_ids"][:, 1:]
    counted = batch.get("loss_mask", batch.get("attention_mask"))
    counted = jnp.ones_like(targets_BxT, jnp.float32) if counted is None else counted[:, 1:].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV[:, :-1].astype(jnp.float32), targets_BxT)
    return (losses * counted).sum(1) / jnp.maximum(counted.sum(1), 1)


def as_batch_of_one(example):
    """An example of a batch (leaves without their row axis) as a batch of one row."""
    return jax.tree.map(lambda x: x[None], example)
