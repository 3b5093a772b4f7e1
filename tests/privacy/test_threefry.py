"""Bits and normals are JAX's own, whose generator is tested there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax.privacy import threefry

KEYS = [[0, 0], [1, 2], [0xFFFFFFFF, 0x9E3779B9]]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4, 5), (40_000,)])
def test_bits_and_normals_are_those_of_jax(key, shape):
    key = jnp.array(key, jnp.uint32)
    ours = jax.random.wrap_key_data(key, impl="threefry2x32")
    np.testing.assert_array_equal(threefry.bits(key, shape), jax.random.bits(ours, shape))
    np.testing.assert_array_equal(threefry.normal(key, shape), jax.random.normal(ours, shape))


def test_the_published_known_answer():
    """Random123's kat_vectors: threefry2x32, 20 rounds, key and counter of pi's digits."""
    key = jnp.array([0x13198A2E, 0x03707344], jnp.uint32)
    left, right = threefry._block(key, np.uint32(0x243F6A88), np.uint32(0x85A308D3))
    assert (int(left), int(right)) == (0xC4923A9C, 0x483DF7A0)


def test_a_counter_never_repeats():
    with pytest.raises(ValueError, match="more than one key's counter"):
        jax.eval_shape(lambda key: threefry.bits(key, (1 << 16, (1 << 16) + 1)), jnp.zeros(2, jnp.uint32))
