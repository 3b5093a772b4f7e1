"""GELU and its slope, which are written out, against double precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dplora_jax.models.layers import gelu

X = np.concatenate([np.linspace(-12, 12, 4001), [-100, -30, 0, 30, 100]]).astype(np.float32)
BELOW = np.array([0.5 * math.erfc(-x * math.sqrt(0.5)) for x in X.tolist()])
SLOPE = BELOW + np.float64(X) * np.exp(-0.5 * np.float64(X) ** 2) / math.sqrt(2 * math.pi)


def test_gelu_and_its_slope_are_those_of_double_precision():
    np.testing.assert_allclose(gelu(X), X * BELOW, atol=2e-6, rtol=2e-7)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(X), SLOPE, atol=1e-6)


def test_slopes_go_forward_and_backward_and_carry_what_comes_in():
    change = jnp.cos(X)
    for found in (jax.jvp(gelu, (X,), (change,))[1], jax.vjp(gelu, jnp.asarray(X))[1](change)[0]):
        np.testing.assert_allclose(found, SLOPE * change, atol=1e-6)


def test_narrow_numbers_are_rounded_once():
    low = jnp.asarray(X, jnp.bfloat16)
    found = gelu(low)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, gelu(low.astype(jnp.float32)).astype(jnp.bfloat16))
    assert jax.vmap(jax.grad(gelu))(low).dtype == jnp.bfloat16
