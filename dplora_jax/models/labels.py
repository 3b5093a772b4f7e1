"""A base classifier's labels, by their names in its config.json, and its head in the order of another list of names."""

import re

import jax.numpy as jnp

from dplora_jax.errors import InputError
from dplora_jax.models.family import sizes


def names(hf):
    """The labels of a classifier's config.json `hf` in the order of its outputs, as transformers reads it: `id2label`, whatever
    `label2id` and `num_labels` say beside it; else LABEL_0, LABEL_1, ..., two where `num_labels` lacks."""
    named = hf.get("id2label")
    if not named:
        count = hf.get("num_labels")
        (count,) = sizes(hf, "num_labels") if type(count) is int and count > 0 else (2,)
        return tuple(f"LABEL_{i}" for i in range(count))
    if not isinstance(named, dict) or set(named) != {str(i) for i in range(len(named))}:
        raise InputError(f"config.json: id2label must name the outputs 0 to {len(named) - 1}, each once.")
    return tuple(str(named[str(i)]) for i in range(len(named)))


def rows(base, wanted):
    """Which output of a head with labels `base` stands for each of the labels `wanted`: names match up to case, and the label
    "1" is LABEL_1. None where one is not among them, or a name is there twice.

    >>> rows(("Positive", "negative", "neutral"), ("negative", "positive"))
    (1, 0)
    """
    base, wanted = (tuple(map(_plain, labels)) for labels in (base, wanted))
    if len(set(base)) < len(base) or not set(wanted) <= set(base):
        return None
    return tuple(map(base.index, wanted))


def _plain(name):
    return re.sub(r"^label_(\d+)$", r"\1", str(name).strip().casefold())


def stored_outputs(hf, wanted, stored):
    """(the rows of a stored head of `stored` outputs for the labels `wanted`, or None for a fresh one; what was done, in words,
    or None where the head is read as it is)."""
    base = names(hf)
    outputs = rows(base, wanted) if len(base) == stored else None
    if outputs is None:
        listed = ", ".join(base) if len(base) == stored else f"{stored} unnamed ones"
        return None, f"the base's classification head has other labels ({listed}): the head starts fresh, at zero"
    if outputs == tuple(range(stored)):
        return outputs, None
    return (
        outputs,
        f"the base's classification head, whose labels are {', '.join(base)}, is put in the task's order by name",
    )


def aligned(head, outputs, count):
    """`head` {"kernel" [I, O'], "bias" [O']} with the outputs `outputs`, or with `count` zero ones where `outputs` is None."""
    if outputs is None:
        return {part: jnp.zeros((*value.shape[:-1], count), value.dtype) for part, value in head.items()}
    return {part: jnp.asarray(value)[..., jnp.asarray(outputs)] for part, value in head.items()}
