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
    draws = (_bits(keys, (records,)) >> (32 - BITS)).astype(jnp.int32)
    return chosen(draws, size, join_below, own_capacity, capacity)


def _bits(keys, shape):
    """Random uint32 of `shape`: the exclusive or of the keys' streams."""
    streams = jax.vmap(lambda key: jax.random.bits(key, shape, jnp.uint32))(keys.reshape(-1))
    return functools.reduce(jnp.bitwise_xor, streams)


def chosen(draws, size, join_below, own_capacity, capacity):
    """`poisson` from each record's draw, `draws` int32 [records] uniform below 2^30."""
    draws = jnp.where(jnp.arange(len(draws)) < size, draws, 1 << BITS)
    negated, indices = jax.lax.top_k(-draws, capacity)
    joined = (-negated < join_below) & (jnp.arange(capacity) < own_capacity)
    return jnp.where(joined, indices, 0), joined.astype(jnp.float32)


def subsets(keys, step, counts, most):
    """At most `most` of the rows that each of B units has, at random -> (places in the unit [B, most] int32, float32 of 1 where a
    row stands and 0 where the unit has no more).

    A unit of `counts` [B] rows brings all of them where these are no more than `most`, else a uniformly random subset (up to
    count 2^-32 for each draw), by Floyd's algorithm (Bentley and Floyd 1987): time and shape follow `most` alone. `keys` uint32
    [4, 2] are the client's of this round; `step` is folded in. How a unit chooses among its own rows decides nothing of its
    privacy, for its whole gradient is clipped.
    """
    four = _at_step(keys, step)
    draws, bounds = _bits(four, (*counts.shape, most)), jnp.maximum(counts, most)

    def one(chosen, place):
        last = bounds - most + place
        drawn = (draws[..., place] % (last + 1).astype(jnp.uint32)).astype(jnp.int32)
        drawn = jnp.where((chosen == drawn[..., None]).any(-1), last, drawn)
        return chosen.at[..., place].set(drawn), None

    chosen, _ = jax.lax.scan(one, jnp.full(draws.shape, -1, jnp.int32), jnp.arange(most))
    there = chosen < counts[..., None]
    return jnp.where(there, chosen, 0), there.astype(jnp.float32)


def _at_step(keys, step):
    """The four JAX keys of local step `step` from `keys` uint32 [4, 2] of a client's round."""
    return jax.vmap(lambda key: jax.random.fold_in(key, step))(jax.random.wrap_key_data(keys, impl="threefry2x32"))


@dataclasses.dataclass(frozen=True)
class ByKeys:
    """Which records join a step, by the device's own generator; a step samples from one of `parts` parts of them."""

    parts: int = 1

    def rows(self, keys, step, client, records, capacity):
        """`poisson` of local step `step` for a `client.Client`, by its `keys` uint32 [4, 2] of this round -> (rows of the part,
        weights)."""
        part = lambda size: (size + self.parts - 1) // self.parts  # noqa: E731
        population, records = part(client.population), part(records)
        return poisson(_at_step(keys, step), population, client.join_below, client.capacity, records, capacity)
