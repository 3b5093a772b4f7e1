"""Means that a few clients cannot drag anywhere: coordinate by coordinate, every client counting the same (Yin et al. 2018).

Letters: K clients.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dplora_jax.federation import aggregation


def _sorted(leaf, valid):
    """`leaf` [K, ...] sorted over clients, those that are not `valid` [K] last; and each place's index [K, 1, ...]."""
    per_client = (-1, *[1] * (leaf.ndim - 1))
    ordered = jnp.sort(jnp.where(valid.reshape(per_client), leaf, jnp.inf), axis=0)
    return ordered, jnp.arange(len(leaf)).reshape(per_client)


def _mean_of(leaf, kept):
    return jnp.where(kept, leaf, 0).sum(0) / jnp.maximum(kept.sum(0), 1)


@functools.cache  # so that rounds of one share are equal
def trimmed_mean(share):
    """A function (uploads [K, ...], valid bool [K]) -> the mean of each coordinate without its ceil(share m) smallest and as many
    largest values, of the m valid ones (Yin et al. 2018, definition 2), and with one left at least. So up to that many clients of
    garbage move it no further than the others reach. `share` in (0, 1/2)."""

    def combine(uploads, valid):
        count = valid.sum()
        cut = jnp.minimum(jnp.ceil(share * count - 1e-6).astype(jnp.int32), (count - 1) // 2)

        def one(leaf):
            ordered, place = _sorted(leaf, valid)
            return _mean_of(ordered, (place >= cut) & (place < count - cut))

        return jax.tree.map(one, uploads)

    return combine


def median(uploads, valid):
    """Each coordinate's median over the valid clients, the mean of the middle two where they are even in number (Yin et al. 2018,
    definition 1); uploads [K, ...], valid bool [K]."""
    count = valid.sum()

    def one(leaf):
        ordered, place = _sorted(leaf, valid)
        return _mean_of(ordered, ((place == (count - 1) // 2) | (place == count // 2)) & (place < count))

    return jax.tree.map(one, uploads)


@dataclasses.dataclass(frozen=True)
class RobustMean(aggregation.Mean):
    """The rule of modes `local` and `none` with `combine`, a robust mean (uploads [K, ...], valid [K]) -> mean, in the place
    of the weighted one."""

    combine: Callable
    shows = True

    def mean(self, terms, weight, counts, shown):
        """The robust mean of all clients' uploads, from all devices."""
        gather = lambda x: jax.lax.all_gather(x, aggregation.CLIENTS, tiled=True)  # noqa: E731
        return self.combine(jax.tree.map(gather, shown.upload), gather(shown.valid))
