"""Clipped gradients as integers: multiples of clip_norm 2^-bits, a row's norm at most 2^bits whatever floating point does.

With integer sums and integer noise (`host_noise`), what is released holds no low-order bits for an attack to read
(Mironov 2012; Haney et al. 2022). Letters: B rows.
"""

import math

import jax
import jax.numpy as jnp

from dplora_jax.errors import InputError

MOST_BITS, LEAST_BITS = 20, 12
REACH = 17  # standard deviations: what `host_noise` never exceeds
ROUGHEST = 32  # units of the grid: the least deviation of a rounded share of which several are added up (PRIVACY.md)
MARGIN = 1 - 2**-12  # aimed below the bound by more than float32 norms are off, so that rows are cut and not dropped
CHUNK = 1024  # squares of 10-bit digits that a uint32 holds the sum of
MOST_COORDINATES = CHUNK << 16


def bits_for(sums):
    """The finest grid on which none of `sums`, lists of the mechanisms whose sums and noise are added up, can leave int32: the
    total of (capacity + REACH sigma) 2^bits < 2^31.

    Beyond int32 sums would wrap around, which is post-processing and costs utility alone. Raises InputError where the grid
    would be coarser than clip_norm 2^-LEAST_BITS, or where several shares' noise would be too coarse (`ROUGHEST`).
    """
    reach = max(sum(m.capacity + REACH * m.noise_multiplier for m in together) for together in sums)
    bits = min(MOST_BITS, 31 - math.floor(math.log2(reach)) - 1)
    if bits < LEAST_BITS:
        raise InputError(
            f"noise=hardened sums in 32-bit integers, too small for a batch capacity and noise of {reach:.3g} clip norms: "
            "lower `expected_batch_size` or the noise."
        )
    if any(m.noise_multiplier * 2**bits < ROUGHEST for together in sums if len(together) > 1 for m in together):
        raise InputError(
            f"noise=hardened adds up rounded shares, and a share of less than {ROUGHEST} units of its grid would "
            f"not be as good as "
            "a normal's: take more noise."
        )
    return bits


def check_size(tree):
    """Raise InputError where a gradient like `tree` has more coordinates than an integer norm can be taken of."""
    if sum(leaf.size + CHUNK for leaf in jax.tree.leaves(tree)) > MOST_COORDINATES:
        raise InputError(f"noise=hardened serves up to {MOST_COORDINATES:,} trained parameters: lower `rank`.")


def clipped_sum(factors, grads, bits):
    """Sum over rows of factors_i g_i, each truncated towards zero to integers -> a tree of int32.

    `grads` leaves are [B, ...], `factors` [B] for each leaf (or [B, L] for one stacked over layers), scaled so that a row's norm
    should be at most 2^bits. A row whose integers' norm is above that, or might be, adds nothing: a row moves the integer sum by
    at most 2^bits for any factors and gradients. The sum is exact, in any order. Raises InputError beyond MOST_COORDINATES.
    """
    # The norm is of the very integers that are summed: neither is worked out from anything before them.
    rows = jax.lax.optimization_barrier(jax.tree.map(lambda f, g: _truncated(f, g, bits), factors, grads))
    keep = _within(jax.tree.leaves(rows), bits)
    return jax.tree.map(lambda z: jnp.where(keep.reshape(-1, *[1] * (z.ndim - 1)), z, 0).sum(0, dtype=jnp.int32), rows)


def value(total, clip_norm, bits):
    """The integers `total` times clip_norm 2^-bits, leaf by leaf, float32."""
    unit = clip_norm * 2.0**-bits
    return jax.tree.map(lambda t: unit * t.astype(jnp.float32), total)


def _truncated(factors, g, bits):
    scaled = factors.reshape(*factors.shape, *[1] * (g.ndim - factors.ndim)) * g.astype(jnp.float32)
    return jnp.where(jnp.abs(scaled) <= 2**bits, scaled, 0).astype(jnp.int32)  # nan is not <=: it becomes 0


def _within(leaves, bits):
    """Whether each row's sum of squares, over all leaves, is surely at most 2^(2 bits) -> bool [B].

    |z| = 2^10 a + b. The sums of a^2, ab and b^2 are exact in uint32: over chunks first, then of the chunks' upper and lower
    halves. Only these six numbers meet in float32, which errs by less than 2^-20 of their sum.
    """
    total = 0
    check_size([z[0] for z in leaves])
    for z in leaves:
        flat = jnp.abs(z).astype(jnp.uint32).reshape(z.shape[0], -1)
        flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % CHUNK))).reshape(z.shape[0], -1, CHUNK)
        a, b = flat >> 10, flat & 1023
        sums = jnp.stack([part.sum(-1, dtype=jnp.uint32) for part in (a * a, a * b, b * b)])
        total += jnp.stack([sums >> 15, sums & 0x7FFF]).sum(-1, dtype=jnp.uint32)
    weights = jnp.array([[2.0**35, 2.0**26, 2.0**15], [2.0**20, 2.0**11, 1.0]], jnp.float32) * 4.0**-bits
    return (weights[..., None] * total.astype(jnp.float32)).sum((0, 1)) <= 1 - 2**-20
