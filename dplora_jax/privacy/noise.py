"""Gaussian noise for a pytree, from keys that no two draws share; independent over steps, or correlated."""

import jax
import jax.numpy as jnp

from dplora_jax.privacy import threefry

DRAWS = 4  # keys to a draw; 4 x 64 bits carry a client's whole 256-bit digest


def gaussian(keys, tree, std, step):
    """Noise like `tree`: independent N(0, std^2) in every coordinate, float32.

    `keys` [4, 2] uint32 are four threefry keys of one client, round and attempt; `step` (int32, traced or not) and the leaf's
    index are folded into each, so that no two leaves or steps share a draw. Each draw is half the sum of four standard
    normals: JAX's float32 normal never leaves 5.42 standard deviations, and a sum of four reaches 10.84.
    """
    leaves, treedef = jax.tree.flatten(tree)
    own = [jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), step) for key in keys]

    def draw(index, shape):
        four = [jax.random.key_data(jax.random.fold_in(key, index)) for key in own]
        return std * 0.5 * sum(threefry.normal(key, shape) for key in four)

    return treedef.unflatten([draw(index, leaf.shape) for index, leaf in enumerate(leaves)])


def add(tree, noise):
    """`tree` plus `noise`, leaf by leaf, in float32."""
    return jax.tree.map(lambda x, n: x.astype(jnp.float32) + n, tree, noise)


def banded(steps, bands):
    """Noise C^-1 z over `steps` local steps, z independent, for a lower triangular C of `bands` bands whose columns have norm 1
    (banded matrix factorisation, Choquette-Choo et al. 2023, algorithm 9) -> jax_privacy's StreamingMatrix: its
    `init_multiply(tree)` gives a memory, and `multiply_next(noise, memory)` a step's correlated noise and the next memory.

    C's bands are the coefficients of (1 - x)^-1/2, the best there are for the largest error of a running sum (Fichtenberger
    et al. 2023), cut off and normalised.
    """
    from jax_privacy.matrix_factorization import banded as factorization  # slow to import; most runs need none of it

    with jax.ensure_compile_time_eval():
        return factorization.ColumnNormalizedBanded.default(steps, bands).inverse_as_streaming_matrix()
