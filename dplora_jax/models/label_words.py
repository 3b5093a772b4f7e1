"""A language model as a classifier: the label is the word that follows a prompt.

Letters: B rows, K labels, D width.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from dplora_jax.models import features
from dplora_jax.models.layers import at_last, attended


@dataclasses.dataclass(frozen=True)
class LabelWords:
    """`model`, a `decoder.Decoder`, as a classifier of K labels by what it says after each row's last attended token.

    Of all its next-token logits it keeps those of `words`, one token for each label, so that a record's gradient speaks of which
    label it has, and not of how to answer. A model likes some words better than others whatever the text says:
    `params["measured"]["bias"]` [K], the words' mean log-probabilities, is taken off: over public text of the task's kind
    (Fei et al. 2023, arXiv 2305.19148), or behind a prompt without a text (contextual calibration, Zhao et al. 2021,
    arXiv 2102.09690).
    """

    model: Any
    words: tuple[int, ...]

    @property
    def config(self):
        """The model's own, with how many labels there are."""
        return dataclasses.replace(self.model.config, num_labels=len(self.words))

    @property
    def dtype(self):
        """Of activations."""
        return self.model.dtype

    def apply(self, params, batch, adapter=None):
        """Logits [B, K] float32 of a batch as `model` takes it."""
        last_BxD = at_last(self.model.hidden(params, batch, adapter), attended(batch))
        logits = self.model.logits(params, last_BxD, jnp.array(self.words))
        return logits - params.get(features.KEY, {}).get("bias", 0.0)
