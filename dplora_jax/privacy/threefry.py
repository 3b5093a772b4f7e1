"""JAX's own random bits, computed without a loop: Threefry-2x32 of 20 rounds (Salmon et al. 2011) over a counter.

On a CPU, JAX compiles the rounds to a loop that goes through memory in each turn, four times as slow as one pass over the output
(docs/results/speed.md). Here the rounds are written out, so that a compiler makes one elementwise kernel of them.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)  # of the key schedule


def bits(key, shape):
    """Uniform uint32 of `shape` from `key`, a threefry key's data [2] uint32: what `jax.random.bits` draws, to the bit, with
    `jax_threefry_partitionable` (its default). ValueError beyond 2^32 words, where the counter would repeat."""
    size = int(np.prod(shape))
    if size > 1 << 32:
        raise ValueError(f"{size:,} words are more than one key's counter of 32 bits tells apart.")
    counter = jax.lax.iota(jnp.uint32, size)
    return jnp.bitwise_xor(*_block(key, jnp.zeros_like(counter), counter)).reshape(shape)


def _block(key, left, right):
    """One block: the words `left` and `right` enciphered under `key` -> two words."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ PARITY)
    left, right = left + schedule[0], right + schedule[1]
    for turn, rotations in zip(range(1, 6), itertools.cycle(ROTATIONS), strict=False):
        for rotation in rotations:
            left = left + right
            right = left ^ ((right << np.uint32(rotation)) | (right >> np.uint32(32 - rotation)))
        left, right = left + schedule[turn % 3], right + schedule[(turn + 1) % 3] + np.uint32(turn)
    return left, right


def normal(key, shape):
    """Standard normals float32 of `shape`, as `jax.random.normal` makes them of a key's bits: of 23 of the 32, by the inverse
    error function."""
    mantissa = (bits(key, shape) >> 9) | jnp.uint32(0x3F800000)  # of a float in [1, 2)
    low = np.nextafter(np.float32(-1), np.float32(0))
    unit = (jax.lax.bitcast_convert_type(mantissa, jnp.float32) - 1) * (1 - low) + low
    return np.float32(2**0.5) * jax.lax.erf_inv(jnp.maximum(low, unit))
