"""From records to arrays, and from logits to metrics. Letters: N records, T tokens, V labels."""

import numpy as np

from dplora_jax.errors import InputError


def classification(tokenizer, records, max_length):
    """Tokenise `records` for a classifier -> dict of int32 `input_ids`, `attention_mask` [N, T = max_length], `labels` [N].

    Every row is padded to the public `max_length`, never to the longest: shapes tell nothing of the texts. Longer texts
    are cut, special tokens kept.
    """
    names = ("input_ids", "attention_mask")
    if not len(records.texts):
        return {name: np.zeros((0, max_length), np.int32) for name in names} | {"labels": np.zeros(0, np.int32)}
    encoded = tokenizer(
        list(records.texts), padding="max_length", truncation=True, max_length=max_length, return_tensors="np"
    )
    return {name: encoded[name].astype(np.int32) for name in names} | {"labels": np.asarray(records.labels, np.int32)}


def check_length(max_length, model, tokenizer):
    """Raise InputError unless rows of `max_length` tokens fit the model and leave room for a token of text."""
    least, most = tokenizer.num_special_tokens_to_add() + 1, model.config.max_positions
    if not least <= max_length <= most:
        raise InputError(f"--max_length={max_length} must lie in {least}..{most} for this model.")


def accuracy(predicted, labels):
    """The share of `predicted` [N] that equals `labels` [N]."""
    return float(np.mean(predicted == labels))


def macro_f1(predicted, labels, classes):
    """The mean over `classes` labels of F1; a class that is neither there nor predicted counts 0, as in scikit-learn.

    >>> round(macro_f1(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]), 3), 4)
    0.7778
    """
    scores = []
    for label in range(classes):
        hits = np.sum((predicted == label) & (labels == label))
        scores.append(2 * hits / max(1, np.sum(predicted == label) + np.sum(labels == label)))
    return float(np.mean(scores))
