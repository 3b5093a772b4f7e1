"""Per-example losses over a model. Letters: B rows, T tokens, V vocabulary."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dplora_jax import next_token


@dataclasses.dataclass(frozen=True, eq=False)
class ModelLoss:
    """`loss(adapter, batch) -> [B]` that hands the adapter to `model.apply` and does nothing else with it.

    That is what the fast clipping forms need: row i's loss depends on row i alone, and the adapter enters by
    `per_row.linear` only.
    """

    model: Any
    params: Any
    logits_loss: Callable

    def __call__(self, adapter, batch):
        return self.logits_loss(self.model.apply(self.params, batch, adapter), batch)

    def activations(self, batch):
        """What the adapted layers compute on: (tokens of a row, dtype)."""
        return batch["hidden" if "hidden" in batch else "input_ids"].shape[1], self.model.dtype


def classification(model, params):
    """Cross-entropy of a classifier: a ModelLoss whose batches carry `labels` [B] int32; losses float32, in nats."""
    return ModelLoss(model, params, classification_of_logits)


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModelLoss(ModelLoss):
    """A ModelLoss of next tokens that makes logits only where there can be a target, a few positions at a time."""

    max_targets: int | None = None

    def __call__(self, adapter, batch):
        if not hasattr(self.model, "vocabulary"):
            return super().__call__(adapter, batch)
        hidden_BxTxD = self.model.hidden(self.params, batch, adapter)
        vocabulary = self.model.vocabulary(self.params).astype(hidden_BxTxD.dtype)
        cap = getattr(self.model, "logit_cap", None)
        return next_token.loss(hidden_BxTxD, vocabulary, *next_token.targets(batch), self.max_targets, cap=cap)


def language_model(model, params, max_targets=None):
    """Mean next-token cross-entropy of each row over its attended targets, in nats: a ModelLoss.

    Batches may carry `loss_mask` [B, T]: then only the tokens that it marks are targets. A row without targets has loss 0.
    `max_targets` is a public bound on the targets of a row: only so many positions then meet the vocabulary, and a row's targets
    beyond it do not count. Of a masked language model it teaches nothing, since its tokens see those that follow.
    """
    return LanguageModelLoss(model, params, language_model_of_logits, max_targets)


def classification_of_logits(logits_BxV, batch):
    """Cross-entropy of `labels` [B] -> [B] float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxV.astype(jnp.float32), batch["labels"])


def language_model_of_logits(logits_BxTxV, batch):
    """Mean cross-entropy over the targets of each row -> [B] float32: token t+1 is predicted at position t."""
    targets_BxT, counted = next_token.targets(batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_BxTxV[:, :-1].astype(jnp.float32), targets_BxT)
    return (losses * counted).sum(1) / jnp.maximum(counted.sum(1), 1)


def as_batch_of_one(example):
    """An example of a batch (leaves without their row axis) as a batch of one row."""
    return jax.tree.map(lambda x: x[None], example)
