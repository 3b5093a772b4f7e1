"""One client's part of a round: sample, clip, add noise, step.

Letters: B rows of the padded batch, K clients, N records on a device.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dplora_jax import lora
from dplora_jax.federation import compression
from dplora_jax.privacy import adaptive, clipping, integers, noise, sampling


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
class LocalConfig:
    """The static part of a local step. `records` is the largest population and `capacity` the largest of any client;
    `private` False is trust mode `none`: no noise, and no clipping when `clip_norm` is infinite. `microbatch` rows are held in
    memory at a time (None = all). `clipping` is a mode of `clipped_grad_sum`, or "adaptive": flat, at a clip norm that each
    client moves towards the `quantile` of its norms at rate `quantile_rate`, from `clip_norm` on. With `bands` above 1, the
    noise of a round's steps is correlated (`noise.banded`) and step t samples from the records whose index is t modulo `bands`.
    With `bits` (hardened noise), gradients are integers on a grid of clip_norm 2^-bits, and noise and sampling draws come from
    the host. With `ranks`, a client's noise stays within its own rank, as the gradient of an adapter that is cut to it does
    (`lora.truncate`). With `upload_bits`, uploads are rounded to so many bits a number (`compression.rounded`). With `pool`,
    the clients of a wave fill so many rows together (`pool.sums`), in their only local step."""

    local_steps: int
    clip_norm: float
    records: int
    capacity: int
    form: str = "auto"
    microbatch: int | None = None
    private: bool = True
    clipping: str = "flat"
    quantile: float = 0.5
    quantile_rate: float = 0.2
    bands: int = 1
    bits: int | None = None
    ranks: bool = False
    upload_bits: int | None = None
    pool: int | None = None

    def __post_init__(self):
        if self.local_steps % self.bands or (self.bands > 1 and self.adaptive):
            raise ValueError(
                f"bands ({self.bands}) must divide local_steps ({self.local_steps}), and be 1 with adaptive clipping: the noise "
                "is accounted as of one scale, over whole turns of the parts."
            )
        if self.bits is not None and (self.adaptive or self.bands > 1 or not self.private):
            raise ValueError("the host's integer noise is independent, of one scale, and never absent.")
        if self.bits is not None and self.upload_bits is not None:
            raise ValueError("uploads are rounded by device keys, and with the host's noise there are none.")
        if self.pool is not None and (self.local_steps > 1 or self.adaptive or self.ranks or self.bits is not None):
            raise ValueError(
                "rows are pooled in a single local step of one adapter and one clip norm, in floating point."
            )

    @property
    def adaptive(self):
        """Whether each client's clip norm moves."""
        return self.clipping == "adaptive"


class Trace(NamedTuple):
    """What a local step can show of itself, for tests and for `private/` only; [local_steps] each, stacked by `update`.

    `released` is the noisy mean gradient that the optimizer saw (public in mode `local`), and `count` the noisy centred count
    of adaptive clipping, else () (public too); the others are private.
    """

    released: Any
    loss: Any
    clip_fraction: Any
    sampled: Any
    count: Any = ()


class Sums(NamedTuple):
    """A local step before its noise: which rows count [C], the sum of their clipped gradients, their norms and losses [C]."""

    weights: Any
    grad_sum: Any
    norms: Any
    losses: Any


def update(loss_fn, optimizer, config: LocalConfig, data, adapter, client: Client, keys, clip_norm=(), sums=None):
    """Run a client's local steps from the global `adapter` -> (upload, Trace, clip norm of the next round).

    `data` is a dict of [N, ...] arrays, `keys` {purpose: uint32 [4, 2]} of this client and round (with hardened noise the draws
    themselves, [local_steps, ...] as `host_noise.round_draws` makes them), `clip_norm` the client's own under adaptive
    clipping, else (); `sums` are the only step's, where they were made in a pool. The upload is the adapter's change.
    The optimizer's state lives for this call (DP-LoRA, Liu et al. 2023, algorithm 1, with per-example clipping).
    """
    memory = noise.banded(config.local_steps, config.bands).init_multiply(adapter) if config.bands > 1 else ()

    def step(carry, index):
        params, state, clip_norm, memory = carry
        grad, clip_norm, memory, trace = _noisy_mean_gradient(
            loss_fn, config, data, params, client, keys, index, clip_norm, memory, sums
        )
        updates, state = optimizer.update(grad, state, params)
        return (optax.apply_updates(params, updates), state, clip_norm, memory), trace

    start = adapter, optimizer.init(adapter), clip_norm, memory
    (params, _, clip_norm, _), traces = jax.lax.scan(step, start, jnp.arange(config.local_steps))
    return jax.tree.map(jnp.subtract, params, adapter), traces, clip_norm


def sent(config: LocalConfig, upload, keys):
    """`upload` as it arrives: rounded to `upload_bits`, where there are such."""
    if config.upload_bits is None:
        return upload
    key = jax.random.wrap_key_data(keys["noise"][0], impl="threefry2x32")
    key = jax.random.fold_in(key, config.local_steps)  # a step that no noise is drawn for
    return compression.rounded(key, upload, config.upload_bits)


def share(loss_fn, config: LocalConfig, data, adapter, client: Client, keys, sums=None):
    """A client's share of the total in trust mode `distributed`: one step's clipped sum and its part of the noise, undivided,
    to be seen in the total alone -> (upload, Trace). Dividing, rates and momentum are the server's."""
    of_sum = client._replace(divisor=1.0)
    noisy, _, _, trace = _noisy_mean_gradient(loss_fn, config, data, adapter, of_sum, keys, 0, (), (), sums)
    return noisy, jax.tree.map(lambda x: x[None], trace)


def _noisy_mean_gradient(loss_fn, config, data, adapter, client, keys, index, moving, memory, sums):
    """(clipped sum + noise) / the public expected batch size, the next clip norm and noise memory, and what to show of it."""
    clip_norm = moving if config.adaptive else config.clip_norm
    if sums is None:
        batch, weights = drawn(config, data, client, keys, index)
        sums = Sums(weights, *_in_microbatches(loss_fn, config, adapter, batch, clip_norm, weights))
    weights, grad_sum, norms, losses = sums
    count = adaptive.centred_count(norms, clip_norm, weights) if config.adaptive else ()
    if config.private:
        (grad_sum, count), memory = _add_noise(config, (grad_sum, count), client, keys, index, clip_norm, memory)
    if config.adaptive:
        moving = adaptive.next_norm(clip_norm, count, client.divisor, config.quantile, config.quantile_rate)
    released = jax.tree.map(lambda g: g / client.divisor, grad_sum)
    if config.ranks:  # what was cut has noise, and no gradient
        released = lora.truncate(released, client.rank)
    sampled = weights.sum()
    shown = jnp.maximum(sampled, 1)
    clipped = ((norms > clip_norm) & (weights > 0)).sum() / shown
    trace = Trace(released, jnp.where(weights > 0, losses, 0).sum() / shown, clipped, sampled, count)
    return released, moving, memory, trace


def drawn(config, data, client, keys, index):
    """The padded batch of local step `index` and its weights: out of `data`, or as the host drew and sent them with the keys."""
    if "batch" in keys:
        return jax.tree.map(lambda x: x[index], (keys["batch"], keys["weights"]))
    rows, weights = sample(config, client, keys, index)
    return {name: array[client.offset + rows] for name, array in data.items()}, weights


def sample(config, client, keys, index):
    """Which of the client's records join local step `index`: (rows within the client [capacity], weights of 0 or 1). Null
    records are drawn and take rows like others, for they are accounted as records; their weight is 0."""
    if config.bits is not None:
        draws = keys["sampling"][index]
        rows, weights = sampling.chosen(draws, client.population, client.join_below, client.capacity, config.capacity)
    else:
        four = jax.vmap(lambda key: jax.random.fold_in(key, index))(
            jax.random.wrap_key_data(keys["sampling"], impl="threefry2x32")
        )
        part = lambda size: (size + config.bands - 1) // config.bands  # noqa: E731
        rows, weights = sampling.poisson(
            four, part(client.population), client.join_below, client.capacity, part(config.records), config.capacity
        )
        if config.bands > 1:
            rows = rows * config.bands + index % config.bands
    inside = rows < client.size
    return jnp.where(inside, rows, 0), weights * inside


def _add_noise(config, sums, client, keys, index, clip_norm, memory):
    """(grad_sum, count) plus their noise, and the memory of correlated noise."""
    grad_sum, count = sums
    if config.bits is not None:
        own = dict(jax.tree.leaves_with_path(keys["noise"]))  # of a whole adapter, of which a half may be trained
        drawn = jax.tree.map_with_path(lambda path, _: own[path][index], grad_sum)
        return (integers.released(grad_sum, drawn, config.clip_norm, config.bits), count), memory
    if config.adaptive:  # one draw for both: the count is a leaf of its own
        drawn, of_count = noise.gaussian(keys["noise"], sums, 1.0, index)
        std = client.noise_std * (clip_norm / config.clip_norm)
        return (
            noise.add(grad_sum, jax.tree.map(lambda x: std * x, drawn)),
            count + client.count_std * of_count,
        ), memory
    drawn = noise.gaussian(keys["noise"], grad_sum, client.noise_std, index)
    if config.bands > 1:
        drawn, memory = noise.banded(config.local_steps, config.bands).multiply_next(drawn, memory)
    return (noise.add(grad_sum, drawn), count), memory


def _in_microbatches(loss_fn, config, adapter, batch, clip_norm, weights):
    """`clipped_grad_sum` over the batch, `microbatch` rows at a time: sums of clipped gradients add up."""
    mode = "flat" if config.adaptive else config.clipping

    def one(batch, weights):
        if not config.private and config.clip_norm == float("inf"):
            return _plain_grad_sum(loss_fn, adapter, batch, weights)
        return clipping.clipped_grad_sum(loss_fn, adapter, batch, clip_norm, weights, config.form, mode, config.bits)

    return clipping.in_turns(one, config.microbatch or config.capacity, batch, weights)


def _plain_grad_sum(loss_fn, adapter, batch, weights):
    """The weighted sum of gradients without clipping; norms are not computed, and reported as 0."""

    def total(adapter):
        losses = loss_fn(adapter, batch)
        return jnp.sum(weights * losses), losses

    grads, losses = jax.grad(total, has_aux=True)(adapter)
    return grads, jnp.zeros_like(weights), losses
