"""Per-example losses over a model. Letters: B rows, T tokens, V vocabulary."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dplora_jax import next_token
from dplora_jax.models.label_words import LabelWords


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
        vocabulary = self.model.vocabulary(self.params)
        cap = getattr(self.model, "logit_cap", None)
        return next_token.loss(hidden_BxTxD, vocabulary, *next_token.targets(batch), self.max_targets, cap=cap)


def reader(loss, model, params):
    """The model whose logits `loss(model, params)` reads: of a `ModelLoss` its own, which may be another view of `model`
    (`label_words`), else `model`."""
    return getattr(loss(model, params), "model", model)


def label_words(words):
    """`classification` by a language model, whose labels are the tokens `words`, one each (`models.label_words.LabelWords`)."""
    return functools.partial(_by_words, tuple(words))


def _by_words(words, model, params):
    return classification(LabelWords(model, words), params)


def language_model(model, params, max_targets=None):
    """Mean next-token cross-entropy of each row over its attended targets, in nats: a ModelLoss.

    Batches may carry `loss_mask` [B, T]: then only the tokens that it marks are targets. A row without targets has loss 0.
    `max_targets` is a public bound on the targets of a row: only so many positions then meet the vocabulary, and a row's targets
    beyond it do not count. Of a masked language model it teaches nothing, since its tokens see those that follow.
    """
    return LanguageModelLoss(model, params, language_model_of_logits, max_targets)


@dataclasses.dataclass(frozen=True, eq=False)
class UnitLoss(ModelLoss):
    """`of_rows`, a ModelLoss, of units of G rows: see `of_units`. A unit's rows share the slots of its gradient, so that it is
    clipped as one, and no row's gradient is made."""

    of_rows: Any = None

    def __call__(self, adapter, batch):
        return _unit_means(self.of_rows, adapter, batch)

    def activations(self, batch):
        """What the adapted layers compute on: (tokens of all rows of a unit, dtype)."""
        tokens, dtype = self.of_rows.activations(_rows_of(batch))
        return batch[BROUGHT].shape[1] * tokens, dtype


BROUGHT = "brought"  # of a batch of units: 1 for each row that a unit has, 0 for what fills it up, [B, G]


def of_units(loss, model, params):
    """The loss of units, whose rows' loss is `loss(model, params)`: a batch's leaves are [B, G, ...], G rows for each of B units,
    and `brought` [B, G] is 1 where there is a row. A unit's loss is the mean over its rows, float32 [B] (Charles et al. 2024,
    section 3.2), and 0 for a unit without rows."""
    rows = loss(model, params)
    if isinstance(rows, ModelLoss):
        return UnitLoss(rows.model, rows.params, rows.logits_loss, rows)
    return lambda adapter, batch: _unit_means(rows, adapter, batch)


def _rows_of(batch):
    """The rows [B G, ...] of a batch of units."""
    return {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items() if name != BROUGHT}


def _unit_means(of_rows, adapter, batch):
    brought = batch[BROUGHT]
    losses = of_rows(adapter, _rows_of(batch)).reshape(brought.shape)
    return jnp.where(brought > 0, losses, 0).sum(1) / jnp.maximum(brought.sum(1), 1)


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
