"""From uploads to the next global adapter: small pure functions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

CLIENTS = "clients"  # the mesh axis


def weighted_sum(weights, uploads):
    """sum_k weights_k uploads_k over the leading axis of every leaf: FedAvg's mean where the weights sum to 1
    (McMahan et al. 2017, algorithm 1)."""
    return jax.tree.map(lambda u: jnp.tensordot(weights, u, 1), uploads)


def groups(transforms):
    """A transformation that gives each top-level part of an adapter its own: {"layers": ..., "head": ...}."""

    def label(tree):
        return {part: jax.tree.map(lambda _, part=part: part, tree[part]) for part in tree}

    return optax.multi_transform(transforms, label)


class Average(NamedTuple):
    """The exponential moving average of the released adapters, free of privacy cost by post-processing."""

    mean: Any
    rounds: Any


def average_init(adapter):
    """The average before any round: the adapter itself, with no weight of its own."""
    return Average(jax.tree.map(jnp.array, adapter), jnp.zeros((), jnp.int32))


def average_update(average, adapter, decay):
    """Fold one round's adapter in; unbiased from the first round on, as Adam's moments are (Kingma and Ba 2015, section 3)."""
    rounds = average.rounds + 1
    rate = (1 - decay) / (1 - decay ** rounds.astype(jnp.float32)) if decay else 1.0
    return Average(jax.tree.map(lambda m, x: m + rate * (x - m), average.mean, adapter), rounds)
