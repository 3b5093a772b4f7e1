"""Noise from a cryptographic generator, on the host: normals rounded to integers, exactly.

A draw's bits come from SHAKE-256 (FIPS 202) under a key of its own, HMAC-SHA256 of a client's secret. The integer is the one
to which the normal rounds that these bits name: where float64 cannot tell, more bits and more digits decide.
"""

import hashlib
import math

import jax
import mpmath
import numpy as np
from scipy import special

from dplora_jax.privacy import sampling, secrets

SLACK = 2.0**-38  # in standard deviations: beyond scipy's error and the width of one word, above RARE
RARE = 2.0**-26  # a tail probability below which a word is too wide to decide by itself
REFINED = 128  # bits more for those
DISTANCE_LOG2 = -160  # total variation of a draw from the rounded normal: at most 2^32 boundaries, each off by 2^-192
DISPATCH_BYTES = 1 << 30  # of noise at a time


def rounded_normal(key, count, std):
    """`count` independent draws of round(N(0, std^2)) from a `key` of 32 bytes, int32: the same for the same key, anywhere."""
    words = np.frombuffer(hashlib.shake_256(key).digest(8 * count), "<u8")

    def more(index):
        return hashlib.shake_256(key + b"more" + index.to_bytes(8, "little")).digest(REFINED // 8)

    return from_words(words, std, more)


def from_words(words, std, more):
    """The integers to which the normals of `words` [n] uint64 round -> int32 [n].

    Of a word's bits one is the sign and 63 are the tail probability p in (0, 1/2), so that draws far out, up to 16.1 `std`,
    are as exact as others. `more(index)` gives REFINED bits more of p, as bytes, for the few words that need them.
    """
    tail = words >> np.uint64(1)
    p = tail * 2.0**-64 + 2.0**-65
    size = -special.ndtri(p) * std
    rounded = np.rint(size)
    doubtful = (np.abs(np.abs(size - rounded) - 0.5) <= SLACK * std) | (p < RARE)
    for index in np.flatnonzero(doubtful):
        rounded[index] = _refined((int(tail[index]) << REFINED) + int.from_bytes(more(int(index)), "little"), std)
    return np.where(words & np.uint64(1), -rounded, rounded).astype(np.int32)


def _refined(tail, std):
    """The integer m >= 0 to which std times the quantile of a tail of 63 + REFINED bits rounds, by 80 digits."""
    with mpmath.workdps(80):
        p = mpmath.ldexp(2 * tail + 1, -65 - REFINED)
        beyond = lambda m: mpmath.erfc((m - mpmath.mpf(0.5)) / (std * mpmath.sqrt(2))) / 2  # noqa: E731
        m = round(-special.ndtri(float(p)) * std)
        while m > 0 and p > beyond(m):
            m -= 1
        while p <= beyond(m + 1):
            m += 1
    return m


def round_draws(clients, rounds, attempt, local_steps, tree, stds, records):
    """What a dispatch takes in place of `secrets.round_keys`: {"noise": like `tree`, int32 [rounds, K, local_steps, ...],
    "sampling": int32 [rounds, K, local_steps, records], each record's draw of `sampling.BITS` bits}.

    `clients` are the K secrets and `stds` [K] the noise in units of the grid. No two of (client, round, step, attempt, leaf)
    share a key.
    """
    places = [(i, k, t, n) for i, n in enumerate(rounds) for k in range(len(clients)) for t in range(local_steps)]
    shape = len(rounds), len(clients), local_steps

    def key(purpose, k, t, number, *leaf):
        return secrets.digest(clients[k], f"host {purpose}", int(number), t, int(attempt), *leaf)

    leaves, treedef = jax.tree.flatten(tree)
    noise = [np.empty((*shape, *leaf.shape), np.int32) for leaf in leaves]
    draws = np.empty((*shape, records), np.int32)
    for i, k, t, number in places:
        for index, out in enumerate(noise):
            drawn = rounded_normal(key("noise", k, t, number, index), math.prod(out.shape[3:]), stds[k])
            out[i, k, t] = drawn.reshape(out.shape[3:])
        words = np.frombuffer(hashlib.shake_256(key("sampling", k, t, number)).digest(4 * records), "<u4")
        draws[i, k, t] = words >> np.uint32(32 - sampling.BITS)
    return {"noise": treedef.unflatten(noise), "sampling": draws}


def most_rounds(clients, local_steps, parameters, records):
    """How many rounds' draws fit in DISPATCH_BYTES; at least one."""
    return max(1, DISPATCH_BYTES // (4 * clients * local_steps * (parameters + records)))


def excess_log2(draws, epsilon):
    """log2 of what `draws` draws' distance from the rounded normal adds to delta: (1 + e^epsilon) total variation."""
    return DISTANCE_LOG2 + math.log2(draws) + np.logaddexp(0, epsilon) / math.log(2)
