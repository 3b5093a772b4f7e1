"""Accelerators round float32 products unless told not to: norms, and the sums that they bound, are told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import per_row
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
    found = products(lambda *a: per_row._backward((*a[:2], None), a[2])[2], X, WEIGHT, G)
    assert all(exact for shape, exact in found if len(shape) == 3 and shape != X.shape)
    assert any(shape in ((2, 4, 3), (2, 3, 4)) for shape, _ in found)


@pytest.mark.parametrize("tokens", [1, 5], ids=["gram matrices", "the product"])
def test_ghost_norms_are_exact(tokens):
    found = products(per_row.squared_norm, G[:, :tokens], X[:, :tokens])
    assert found
    assert all(exact for _, exact in found)


def test_tokens_that_cancel_never_hide_a_gradient_from_its_ghost_norm():
    """Pairs of tokens 3,000 times longer than what they leave: float32 Gram matrices alone read 0 for some rows."""
    rng = np.random.default_rng(0)
    g, x = rng.normal(size=(64, 4, 768)), rng.normal(size=(64, 4, 512))
    g, x = (300**0.5 * v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (g, x))
    g = np.concatenate([g, -g + 1e-4 * rng.normal(size=g.shape)], 1).astype(np.float32)
    x = np.concatenate([x, x], 1).astype(np.float32)
    exact = np.square(np.einsum("bto,bti->boi", g.astype(np.float64), x.astype(np.float64))).sum((1, 2))
    found = np.asarray(per_row.squared_norm(jnp.asarray(g), jnp.asarray(x)), np.float64)
    assert exact.max() < 1
    assert (found >= exact).all()


def test_the_sum_that_ghost_norms_bound_is_exact():
    found = products(lambda *a: per_row._backward(a[:3], a[3])[1], X, WEIGHT, jnp.ones(2), G)
    assert {exact for shape, exact in found if sorted(shape) == [3, 4]} == {True}


def test_the_sum_of_what_was_kept_is_exact():
    kept = per_row.Kept(jnp.ones((1, 2)), X[None], G[None])
    layer = jax.make_jaxpr(per_row.kept_sum)(jnp.ones(2), kept).jaxpr.eqns
    (scan,) = (e for e in layer if e.primitive.name == "scan")
    found = [e.params["precision"] for e in scan.params["jaxpr"].jaxpr.eqns if "precision" in e.params]
    assert found == [(jax.lax.Precision.HIGHEST,) * 2]
