"""One client's part of a round: sample, clip, add noise, step.

Letters: B rows of the padded batch, K clients, N records on a device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dplora_jax.privacy import clipping, noise, sampling


class Client(NamedTuple):
    """What the program knows of a client, all public; each field is [K] where clients are stacked.

    Its records are rows `offset` to `offset + size` of its device's arrays. `join_below` is `sampling.threshold` of its rate,
    `capacity` the rows it may fill, `divisor` its expected batch size q n, `noise_std` sigma * clip_norm, and `weight` its
    share of the mean. A padding client has size 0, weight 0 and divisor 1.
    """

    offset: Any
    size: Any
    join_below: Any
    capacity: Any
    divisor: Any
    noise_std: Any
    weight: Any


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """The static part of a local step. `records` and `capacity` are the largest of any client; `private` False is trust mode
    `none`: no noise, and no clipping when `clip_norm` is infinite. `microbatch` rows are held in memory at a time
    (None = all)."""

    local_steps: int
    clip_norm: float
    records: int
    capacity: int
    form: str = "auto"
    microbatch: int | None = None
    private: bool = True


class Trace(NamedTuple):
    """What a local step can show of itself, for tests and for `private/` only; [local_steps] each, stacked by `update`.

    `released` is the noisy mean gradient that the optimizer saw (public in mode `local`); the others are private.
    """

    released: Any
    loss: Any
    clip_fraction: Any
    sampled: Any


def update(loss_fn, optimizer, config: LocalConfig, data, adapter, client: Client, keys):
    """Run a client's local steps from the global `adapter` -> (upload, Trace).

    `data` is a dict of [N, ...] arrays, `keys` {purpose: uint32 [4, 2]} of this client and round. The upload is the adapter's
    change. The optimizer's state lives for this call (DP-LoRA, Liu et al. 2023, algorithm 1, with per-example clipping).
    """

    def step(carry, index):
        params, state = carry
        grad, trace = _noisy_mean_gradient(loss_fn, config, data, params, client, keys, index)
        updates, state = optimizer.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), trace

    (params, _), traces = jax.lax.scan(step, (adapter, optimizer.init(adapter)), jnp.arange(config.local_steps))
    return jax.tree.map(jnp.subtract, params, adapter), traces


def share(loss_fn, config: LocalConfig, data, adapter, client: Client, keys):
    """A client's share of the total in trust mode `distributed`: one step's clipped sum and its part of the noise, undivided,
    to be seen in the total alone -> (upload, Trace). Dividing, rates and momentum are the server's."""
    noisy, trace = _noisy_mean_gradient(loss_fn, config, data, adapter, client._replace(divisor=1.0), keys, 0)
    return noisy, jax.tree.map(lambda x: x[None], trace)


def _noisy_mean_gradient(loss_fn, config, data, adapter, client, keys, index):
    """(clipped sum + noise) / the public expected batch size, and what to show of it."""
    key = jax.random.fold_in(jax.random.wrap_key_data(keys["sampling"][0], impl="threefry2x32"), index)
    rows, weights = sampling.poisson(
        key, client.size, client.join_below, client.capacity, config.records, config.capacity
    )
    batch = {name: array[client.offset + rows] for name, array in data.items()}
    grad_sum, norms, losses = _in_microbatches(loss_fn, config, adapter, batch, weights)
    if config.private:
        grad_sum = noise.add(grad_sum, noise.gaussian(keys["noise"], grad_sum, client.noise_std, index))
    released = jax.tree.map(lambda g: g / client.divisor, grad_sum)
    sampled = weights.sum()
    count = jnp.maximum(sampled, 1)
    clipped = ((norms > config.clip_norm) & (weights > 0)).sum() / count
    return released, Trace(released, jnp.where(weights > 0, losses, 0).sum() / count, clipped, sampled)


def _in_microbatches(loss_fn, config, adapter, batch, weights):
    """`clipped_grad_sum` over the batch, `microbatch` rows at a time: sums of clipped gradients add up."""
    one: Callable = clipping.clipped_grad_sum if config.private or config.clip_norm != float("inf") else _plain_grad_sum
    size = config.microbatch or config.capacity
    if size >= config.capacity:
        return one(loss_fn, adapter, batch, config.clip_norm, weights, config.form)
    chunks = -(-config.capacity // size)

    def split(x):
        x = jnp.pad(x, [(0, chunks * size - x.shape[0]), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(chunks, size, *x.shape[1:])

    def add(total, chunk):
        grad, norms, losses = one(loss_fn, adapter, chunk[0], config.clip_norm, chunk[1], config.form)
        return jax.tree.map(jnp.add, total, grad), (norms, losses)

    zeros = jax.tree.map(jnp.zeros_like, adapter)
    total, per_row = jax.lax.scan(add, zeros, jax.tree.map(split, (batch, weights)))
    return total, *(x.reshape(-1)[: config.capacity] for x in per_row)


def _plain_grad_sum(loss_fn, adapter, batch, _clip_norm, weights, _form):
    """The weighted sum of gradients without clipping; norms are not computed, and reported as 0."""

    def total(adapter):
        losses = loss_fn(adapter, batch)
        return jnp.sum(weights * losses), losses

    grads, losses = jax.grad(total, has_aux=True)(adapter)
    return grads, jnp.zeros_like(weights), losses
