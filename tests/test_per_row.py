"""Rows' squared norms, and what of a backward pass is kept for sums of rows' gradients."""

import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import per_row


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(3, 20, 20), (20, 5, 5)])
def test_both_ways_to_a_squared_norm_agree_with_the_product(tokens, inputs, outputs):
    rng = np.random.default_rng(0)
    g, x = (rng.normal(size=(2, tokens, n)).astype(np.float32) for n in (outputs, inputs))
    product = np.einsum("bto,bti->boi", g.astype(np.float64), x.astype(np.float64))
    np.testing.assert_allclose(per_row.squared_norm(g, x), (product**2).sum((1, 2)), rtol=1e-4)


def test_tokens_whose_products_cancel_have_a_squared_norm_of_at_least_zero():
    rng = np.random.default_rng(0)
    x = np.broadcast_to(rng.normal(size=(64, 1, 40)), (64, 4, 40)).astype(np.float32)
    g = rng.normal(size=(64, 4, 40))
    squares = per_row.squared_norm((g - g.mean(1, keepdims=True)).astype(np.float32), x)
    assert (squares >= 0).all()  # not nan once rooted
    assert (squares < 0.5).all()  # of terms up to 26,000


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_sum_of_what_was_kept_is_the_weighted_sum_of_the_products(by_layer):
    rng = np.random.default_rng(0)
    x, g = (rng.normal(size=(2, 3, 4, n)).astype(np.float32) for n in (5, 6))
    factors = rng.uniform(size=(3, 2) if by_layer else 3).astype(np.float32)
    found = per_row.kept_sum(factors, per_row.Kept(x, g))
    expected = np.einsum("bl,lbto,lbti->loi" if by_layer else "b,lbto,lbti->loi", factors, g, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_row_of_factor_zero_adds_nothing_to_a_kept_sum_whatever_it_holds():
    x, g = np.ones((1, 2, 3, 4), np.float32), np.ones((1, 2, 3, 5), np.float32)
    x[0, 1, 0, 0], g[0, 1, 1, 1] = np.nan, np.inf
    found = per_row.kept_sum(np.array([1, 0], np.float32), per_row.Kept(x, g))
    np.testing.assert_array_equal(found, np.full((1, 5, 4), 3))


def test_what_is_kept_is_less_where_a_row_is_short_beside_the_rank():
    assert per_row.keeps_less(128, 2304, 512, jnp.float32)
    assert not per_row.keeps_less(512, 2304, 512, jnp.float32)  # longer than 2304 * 512 / (2304 + 512) = 419
    assert per_row.keeps_less(512, 2304, 512, jnp.bfloat16)
    assert not per_row.keeps_less(128, 2304, 8, jnp.float32)
