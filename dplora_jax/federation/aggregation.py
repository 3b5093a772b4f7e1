"""From uploads to the next global adapter: small pure functions."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dplora_jax import lora
from dplora_jax.privacy import noise

CLIENTS = "clients"  # the mesh axis


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one round's uploads become a mean upload, by trust mode; every number is public and fixed before the run.

    `local` and `none` take the mean by the clients' weights. `distributed` takes the total of noisy sums over `divisor` (the
    sum of all expected batches), if at least `survivors` clients sent theirs. `client` clips each whole update to `clip_norm`,
    adds noise of `noise_std` to the sum of those who joined, and divides by `divisor` (how many are expected to).
    """

    trust: str = "local"
    divisor: float = 1.0
    survivors: int = 0
    clip_norm: float = math.inf
    noise_std: float = 0.0


LOCAL = Rule()


def noisy_mean(total, keys, rule):
    """(sum of clipped updates + the server's noise) / the public number of clients expected (McMahan et al. 2018, algorithm 1).

    `keys` [4, 2] uint32 are the server's of this round.
    """
    noisy = noise.add(total, noise.gaussian(keys, total, rule.noise_std, 0))
    return jax.tree.map(lambda x: x / rule.divisor, noisy)


def choose(flags, new, old):
    """`new` where `flags` holds, else `old`, leaf by leaf: a scalar, or [K] over leaves [K, ...]."""
    over = lambda x: flags.reshape(*flags.shape, *[1] * (x.ndim - flags.ndim))  # noqa: E731
    return jax.tree.map(lambda x, y: jnp.where(over(x), x, y), new, old)


def weighted_sum(weights, uploads):
    """sum_k weights_k uploads_k over the leading axis of every leaf: FedAvg's mean where the weights sum to 1
    (McMahan et al. 2017, algorithm 1). Exact products: where noise comes in the total alone, none may round an upload."""
    return jax.tree.map(lambda u: jnp.tensordot(weights, u, 1, precision=lora.EXACT), uploads)


def finite(upload):
    """Whether every number of `upload` is finite: one that is not is dropped whole, and reported."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(upload)]).all()


def masked(valid, tree):
    """`tree` [K, ...] with zeros for the clients that are not `valid` [K], whatever it holds there."""
    return choose(valid, tree, jax.tree.map(jnp.zeros_like, tree))


def proximal(strength):
    """Pull local steps towards the adapter that the round began with: adds strength (w - w_start) to the gradient (FedProx, Li et
    al. 2020, equation 2). An optax transformation whose state is that adapter; it touches no record, and so costs no privacy."""

    def update(grads, start, params):
        return jax.tree.map(lambda g, w, s: g + strength * (w - s), grads, params, start), start

    return optax.GradientTransformation(lambda params: params, update)


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
