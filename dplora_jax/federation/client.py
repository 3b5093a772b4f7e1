"""One client's part of a round: sample, gather, clip, add noise, step.

Variants are objects that `LocalConfig` holds; a round without any reads top to bottom here.
Letters: B rows of the padded batch, K clients, N records on a device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dplora_jax.federation import compression
from dplora_jax.privacy import clipping
from dplora_jax.privacy.noise import INDEPENDENT, Noise


class Client(NamedTuple):
    """What the program knows of a client, all public; each field is [K] where clients are stacked.

    Its records are rows `offset` to `offset + size` of its device's arrays. A step samples from `population` >= size records
    (`accounting.Mechanism.records`), those beyond its own being null. `join_below` is `sampling.threshold` of its rate,
    `capacity` the rows it may fill, `divisor` its expected batch size q n, `noise_std` sigma * clip_norm, `weight` its share
    of the mean, `count_std` the noise on its centred count (adaptive clipping), and `rank` its own LoRA rank, where clients have
    several. A padding client has size, population and weight 0 and divisor 1.
    """

    offset: Any
    size: Any
    population: Any
    join_below: Any
    capacity: Any
    divisor: Any
    noise_std: Any
    weight: Any
    count_std: Any
    rank: Any


@dataclasses.dataclass(frozen=True)
class OnDevice:
    """Batches that are gathered from records on the device."""

    keys = ("sampling",)  # what a dispatch's keys hold for them

    def batch(self, local, data, client, keys, index):
        """The padded batch of local step `index` and its weights (dict of [B, ...], [B])."""
        picked, weights = self.pick(local, data, client, keys, index)
        return self.gather(data, picked), weights

    def pick(self, local, data, client, keys, index):
        """What step `index` takes, as `gather` reads it (a pytree of [B, ...]), and its weights [B]: the rows, one a record."""
        rows, weights = sample(local, client, keys, index)
        return client.offset + rows, weights

    def gather(self, data, picked):
        """The batch (dict of [B, ...]) of what was picked."""
        return {name: array[picked] for name, array in data.items()}

    def first_picks(self, local, data, clients, keys):
        """The first step of K clients together -> (what `gather` reads them from, what they pick [K, B, ...], weights
        [K, B])."""
        pick = jax.vmap(lambda client, keys: self.pick(local, data, client, keys, 0))
        return data, *pick(clients, keys)


ON_DEVICE = OnDevice()


def whole(tree, client):
    """`tree` as it is: every client has all components of the adapter."""
    return tree


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """The static part of a client's round: sizes, and the objects that do its parts.

    `records` is the largest population and `capacity` the largest of any client; `microbatch` rows are held in memory at a time
    (None = all). `clipper` is a `clipping.Clipper`, `noise` a `noise.Noise`, which also draws who joins. `batches` gives a step's
    rows, `upload` is what becomes of an upload on its way, and `cut` what a client keeps of a tree like the adapter (`ranks`).
    Raises ValueError where the noise does not hide what the others make.
    """

    local_steps: int
    records: int
    capacity: int
    clipper: clipping.Clipper
    noise: Noise = INDEPENDENT
    batches: Any = ON_DEVICE
    upload: Any = compression.EXACT
    cut: Callable = whole
    microbatch: int | None = None

    def __post_init__(self):
        self.noise.check(self)


class Trace(NamedTuple):
    """What a local step can show of itself, for tests and for `private/` only; [local_steps] each, stacked by `update`.

    `released` is the noisy mean gradient that the optimizer saw (public in mode `local`), and `count` the noisy `clipper.count`
    (public too); the others are private.
    """

    released: Any
    loss: Any
    clip_fraction: Any
    sampled: Any
    count: Any


class Sums(NamedTuple):
    """A local step before its noise: which rows count [B], the sum of their clipped gradients, their norms and losses [B]."""

    weights: Any
    grad_sum: Any
    norms: Any
    losses: Any


def update(local, optimizer, sums, adapter, client, keys, kept=()):
    """Run a client's local steps from `adapter` -> (its change, Trace, what the clipper keeps for the next round).

    `sums(adapter, index, clip_norm) -> Sums` are those of a step, `keys` {purpose: uint32 [4, 2]} of this client and round (or
    what else `noise.round_keys` makes). The optimizer's state lives for this call (DP-LoRA, Liu et al. 2023, algorithm 1, with
    per-example clipping).
    """

    def step(carry, index):
        params, state, kept, memory = carry
        grad, kept, memory, trace = noisy_mean_gradient(local, sums, params, client, keys, index, kept, memory)
        updates, state = optimizer.update(grad, state, params)
        return (optax.apply_updates(params, updates), state, kept, memory), trace

    start = adapter, optimizer.init(adapter), kept, local.noise.init(adapter)
    (params, _, kept, _), traces = jax.lax.scan(step, start, jnp.arange(local.local_steps))
    return jax.tree.map(jnp.subtract, params, adapter), traces, kept


def noisy_mean_gradient(local, sums, adapter, client, keys, index, kept, memory):
    """(clipped sum + noise) / the public expected batch size, what the clipper and the noise keep, and the step's Trace."""
    total, kept, memory, trace = noisy_sum(local, sums, adapter, client, keys, index, kept, memory)
    released = jax.tree.map(lambda g: g / client.divisor, local.noise.value(total))
    return released, kept, memory, trace._replace(released=released)


def noisy_sum(local, sums, adapter, client, keys, index, kept, memory):
    """A step's clipped sum and noise, as the noise counts it (`Noise.value`), what the clipper and the noise keep, and the step's
    Trace."""
    clip_norm = local.clipper.norm(kept)
    weights, grad_sum, norms, losses = sums(adapter, index, clip_norm)
    count = local.clipper.count(norms, clip_norm, weights)
    stds = local.clipper.stds(client, clip_norm)
    (grad_sum, count), memory = local.noise.add((grad_sum, count), stds, keys["noise"], index, memory)
    kept = local.clipper.move(kept, count, client.divisor)
    grad_sum = local.cut(grad_sum, client)  # what is cut has noise alone
    sampled = weights.sum()
    shown = jnp.maximum(sampled, 1)
    clipped = ((norms > clip_norm) & (weights > 0)).sum() / shown
    trace = Trace(grad_sum, jnp.where(weights > 0, losses, 0).sum() / shown, clipped, sampled, count)
    return grad_sum, kept, memory, trace


def clipped_sum(loss_fn, local, data, adapter, client, keys, index, clip_norm):
    """The Sums of local step `index`, `microbatch` rows at a time: sums of clipped gradients add up."""
    batch, weights = local.batches.batch(local, data, client, keys, index)

    def clip(batch, weights):
        return local.clipper.sum(loss_fn, adapter, batch, weights, clip_norm, bits=local.noise.bits)

    return Sums(weights, *clipping.in_turns(clip, local.microbatch or local.capacity, batch, weights))


def sample(local, client, keys, index):
    """Which of the client's records join local step `index`: (rows within the client [capacity], weights of 0 or 1). Null
    records are drawn and take rows like others, for they are accounted as records; their weight is 0."""
    rows, weights = local.noise.sampler.rows(keys["sampling"], index, client, local.records, local.capacity)
    inside = rows < client.size
    return jnp.where(inside, rows, 0), weights * inside


@dataclasses.dataclass(frozen=True)
class Apart:
    """Every client clips its own rows: the `waves` that compute clients side by side have nothing to do together."""

    def check(self, rounds):
        """Any clients can."""

    def prepare(self, loss_fn, local, data, adapter, clients, keys):
        """What a wave of K clients computes together before their steps, [K, ...]: nothing."""
        return ()

    def sums(self, prepared, loss_fn, local, data, client, keys):
        """The function (adapter, index, clip_norm) -> Sums of one client's steps."""
        return lambda adapter, index, clip_norm: clipped_sum(
            loss_fn, local, data, adapter, client, keys, index, clip_norm
        )

    def padded_rows(self, local, clients):
        """How many rows a step of `clients` clients computes, padding included."""
        size = min(local.capacity, local.microbatch or local.capacity)
        return -(-local.capacity // size) * size * clients


APART = Apart()
