"""Uploads in fewer bits: stochastic rounding, which is post-processing of a noisy upload and costs no privacy.

Letters: L layers.
"""

import dataclasses

import jax
import jax.numpy as jnp

SCALE_BYTES = 4  # a float32 scale a matrix


def _levels(bits):
    return 2 ** (bits - 1) - 1


def _matrices(part, leaf):
    """Which axes of `leaf` are one matrix: all but the layers' of a stacked one."""
    return tuple(range(part == "layers", leaf.ndim))


def rounded(key, tree, bits):
    """`tree` as it is after a journey in `bits` (8 or 4) a number: each matrix scaled by its largest magnitude and rounded up or
    down at random, so that the mean is the number itself (QSGD, Alistarh et al. 2017, section 3.1).

    `tree` is shaped like an adapter; leaves float32 in and out. A matrix that holds a number that is not finite becomes nan.
    """
    levels = _levels(bits)

    def one(part, leaf, key):
        scale = jnp.abs(leaf).max(_matrices(part, leaf), keepdims=True) / levels
        steps = leaf / jnp.where(scale == 0, 1, scale)
        return jnp.floor(steps + jax.random.uniform(key, leaf.shape)).clip(-levels, levels) * scale

    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    keys = jax.random.split(key, len(leaves))
    done = [one(path[0].key, leaf, k) for (path, leaf), k in zip(leaves, keys, strict=True)]
    return treedef.unflatten(done)


def size(tree, bits=None):
    """Bytes of `tree` (shapes suffice) on its way: float32, or `bits` a number and a scale a matrix."""
    total = 0
    for path, leaf in jax.tree.leaves_with_path(tree):
        if bits is None:
            total += 4 * leaf.size
            continue
        matrices = leaf.shape[0] if path[0].key == "layers" else 1
        total += matrices * (SCALE_BYTES + -(-leaf.size // matrices * bits // 8))
    return total


@dataclasses.dataclass(frozen=True)
class Exact:
    """Uploads that arrive as they were sent."""

    draws = False  # whether it takes the device's keys

    def __call__(self, upload, keys, local_steps):
        """`upload` itself."""
        return upload


EXACT = Exact()


@dataclasses.dataclass(frozen=True)
class Rounded:
    """Uploads that arrive `rounded` to `bits` a number."""

    bits: int
    draws = True

    def __call__(self, upload, keys, local_steps):
        """`upload` as it arrives, by a client's `keys` of the round."""
        key = jax.random.wrap_key_data(keys["noise"][0], impl="threefry2x32")
        key = jax.random.fold_in(key, local_steps)  # a step that no noise is drawn for
        return rounded(key, upload, self.bits)
