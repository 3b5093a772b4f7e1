"""Accelerators round float32 products unless told not to: norms, and the sums that they bound, are told."""

import jax
import jax.numpy as jnp
import pytest

from dplora_jax import lora
from dplora_jax.privacy import clipping

X, WEIGHT, G = jnp.ones((2, 5, 3)), jnp.ones((4, 3)), jnp.ones((2, 5, 4))


def products(function, *arguments):
    """(output shape, whether it is exact) of every matrix product that `function` traces."""
    equations = jax.make_jaxpr(function)(*arguments).jaxpr.eqns
    exact = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    return [(e.outvars[0].aval.shape, e.params["precision"] == exact) for e in equations if "precision" in e.params]


def test_the_sum_of_clipped_gradients_is_exact():
    assert products(clipping._weighted_sum, jnp.ones(2), jnp.ones((2, 4, 3))) == [((4, 3), True)]


def test_each_rows_gradient_is_exact():
    found = products(lambda *a: lora._per_row_backward(a[:3], a[3])[2], X, WEIGHT, jnp.zeros((2, 4, 3)), G)
    assert all(exact for shape, exact in found if len(shape) == 3 and shape != X.shape)
    assert any(shape in ((2, 4, 3), (2, 3, 4)) for shape, _ in found)


@pytest.mark.parametrize("tokens", [1, 5], ids=["gram matrices", "the product"])
def test_ghost_norms_are_exact(tokens):
    found = products(lora._squared_norm, G[:, :tokens], X[:, :tokens])
    assert found
    assert all(exact for _, exact in found)


def test_the_sum_that_ghost_norms_bound_is_exact():
    found = products(lambda *a: lora._per_row_backward(a[:3], a[3])[1], X, WEIGHT, jnp.ones(2), G)
    assert {exact for shape, exact in found if sorted(shape) == [3, 4]} == {True}
