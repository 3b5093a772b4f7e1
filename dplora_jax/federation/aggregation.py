"""From uploads to the next global adapter: small pure functions."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dplora_jax import lora
from dplora_jax.federation import client
from dplora_jax.federation.waves import Shown

CLIENTS = "clients"  # the mesh axis


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


class Settled(NamedTuple):
    """What a round comes to: the mean upload, the next residual, what the server shows {name: tree}, and whether it counts, where
    it may not."""

    mean: Any
    residual: Any
    shown: dict
    counts: Any = ()


@dataclasses.dataclass(frozen=True)
class Mean:
    """The rule of modes `local` and `none`: the mean of uploads that everyone may see, by the clients' weights.

    A rule is what a trust mode is to the rounds; `secure_sum` and `trusted_server` have others. `keys` are what a dispatch's keys
    hold for it, and `shows` whether it needs the uploads side by side.
    """

    keys = ()
    shows = False

    def check(self, rounds):
        """Raise ValueError where `rounds` (a `round.Rounds`) does not go with the rule."""

    def train(self, rounds, sums, began, member):
        """A client's part, from the adapter that it `began` with -> (change, Trace, what the clipper keeps)."""
        return client.update(
            rounds.local, rounds.client_optimizer, sums, began, member.client, member.keys, member.clip_norm
        )

    def total(self, rounds, group, done):
        """(sum of terms, sum of weights, `Shown`) of a wave: uploads that are there and finite count, by their clients' weights.
        One that does not count leaves its client with what it had."""
        there = rounds.attendance.there(group)
        valid = there & jax.vmap(finite)((done.upload, done.own)) & (group.client.size > 0)
        kept = choose(valid, (done.clip_norm, done.own), (group.clip_norm, group.own))
        weights = group.client.weight * valid
        total = weighted_sum(weights, masked(valid, done.terms))
        # What never left its client is not an upload, and its noisy gradients are no one's to see.
        upload, released, count = masked(there, (done.upload, done.trace.released, done.trace.count))
        trace = done.trace._replace(released=released, count=count)
        return total, weights.sum(), Shown(upload, trace, *kept, valid)

    def mean(self, terms, weight, counts, shown):
        """The mean of what counted, from the sums over all clients; 0 in a void round."""
        return jax.tree.map(lambda x: x / jnp.where(counts, weight, 1), terms)

    def settle(self, rounds, terms, weight, state, shown, server_keys):
        """The `Settled` round, from the sums over all clients."""
        counts = weight > 0
        mean = self.mean(terms, weight, counts, shown)
        mean, residual = rounds.method.settle(mean, state.adapter, state.residual, state.average.rounds)
        return Settled(mean, residual, {}, counts)

    def next(self, settled, new, state):
        """The state after the round. A void round leaves no trace: neither momentum nor the average may move by what was not
        released."""
        return choose(settled.counts, new, state)


MEAN = Mean()


def joined_total(group, done):
    """What a wave comes to where uploads are not public: those who joined count in full, whatever their size."""
    weights = group.keys["joins"]
    shown = Shown(done.upload, done.trace, done.clip_norm, done.own, None)
    terms = jax.tree.map(lambda x: jnp.tensordot(weights.astype(x.dtype), x, 1, precision=lora.EXACT), done.terms)
    return terms, weights.sum(), shown
