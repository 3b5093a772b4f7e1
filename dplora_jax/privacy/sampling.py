"""Poisson sampling into a batch of fixed capacity (design as accounted by Chua et al., arXiv 2508.15089)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

BITS = 30  # of each record's draw: joins are decided to 2^-30, and fit int32 with room for "never"


def threshold(sampling_rate):
    """The integer below which a record's draw joins; rounded down, so that the true rate never exceeds the accounted one."""
    return int(sampling_rate * (1 << BITS))


def poisson(keys, size, join_below, own_capacity, records, capacity):
    """Which of a client's records join this step -> (indices [capacity] int32, weights [capacity] float32 of 0 or 1).

    Each of the first `size` records joins independently with probability join_below / 2^30; beyond `own_capacity` a uniformly
    random subset of those who joined stays: given that a record joined, its draw is uniform, so the smallest draws are
    such a subset. `records` >= size and `capacity` >= own_capacity are static; rows of weight 0 are padding.

    `keys` are JAX keys, one or several: draws are the exclusive or of their streams, as hard to guess as all of them together.
    """
    bits = jax.vmap(lambda key: jax.random.bits(key, (records,), jnp.uint32))(keys.reshape(-1))
    draws = (functools.reduce(jnp.bitwise_xor, bits) >> (32 - BITS)).astype(jnp.int32)
    return chosen(draws, size, join_below, own_capacity, capacity)


def chosen(draws, size, join_below, own_capacity, capacity):
    """`poisson` from each record's draw, `draws` int32 [records] uniform below 2^30."""
    draws = jnp.where(jnp.arange(len(draws)) < size, draws, 1 << BITS)
    negated, indices = jax.lax.top_k(-draws, capacity)
    joined = (-negated < join_below) & (jnp.arange(capacity) < own_capacity)
    return jnp.where(joined, indices, 0), joined.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class ByKeys:
    """Which records join a step, by the device's own generator; a step samples from one of `parts` parts of them."""

    parts: int = 1

    def rows(self, keys, step, client, records, capacity):
        """`poisson` of local step `step` for a `client.Client`, by its `keys` uint32 [4, 2] of this round -> (rows of the part,
        weights)."""
        part = lambda size: (size + self.parts - 1) // self.parts  # noqa: E731
        four = jax.vmap(lambda key: jax.random.fold_in(key, step))(jax.random.wrap_key_data(keys, impl="threefry2x32"))
        population, records = part(client.population), part(records)
        return poisson(four, population, client.join_below, client.capacity, records, capacity)
