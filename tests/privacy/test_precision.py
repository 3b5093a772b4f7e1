"""Accelerators round float32 products unless told not to: norms, and the sums that they bound, are told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import lora, losses, per_row
from dplora_jax.privacy import clipping, integers
from tests.privacy.clipping_attack import Matrix

X, WEIGHT, G = jnp.ones((2, 5, 3)), jnp.ones((4, 3)), jnp.ones((2, 5, 4))


def products(function, *arguments):
    """(output shape, whether it is exact) of every matrix product that `function` traces, in the bodies of its loops too."""
    equations = jax.make_jaxpr(function)(*arguments).jaxpr.eqns
    equations += [inner for e in equations if e.primitive.name == "scan" for inner in e.params["jaxpr"].jaxpr.eqns]
    exact = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    return [(e.outvars[0].aval.shape, e.params["precision"] == exact) for e in equations if "precision" in e.params]


def test_the_sum_of_clipped_gradients_is_exact():
    assert products(clipping._weighted_sum, jnp.ones(2), jnp.ones((2, 4, 3))) == [((4, 3), True)]


def test_each_rows_gradient_is_exact():
    slot = jnp.zeros((len(X), *WEIGHT.shape))[..., :0]
    found = products(lambda *a: per_row._backward((*a[:2], slot), a[2])[2], X, WEIGHT, G)
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


@pytest.mark.parametrize("form", ["vmap", "broadcast", "ghost"])
def test_norm_and_sum_are_of_the_same_numbers(form):
    """What is kept of the rows stands behind one barrier, and the backward pass feeds nothing else: no optimisation can work norm
    and sum out of different numbers."""
    adapter = {"layers": {"q": lora.Pair(jnp.ones((2, 3, 4)), jnp.ones((2, 5, 3)), 1.0)}}
    batch = {"x": jnp.ones((2, 6, 4)), "g": jnp.ones((2, 6, 5)), "input_ids": jnp.zeros((2, 6), jnp.int32)}
    loss = losses.ModelLoss(Matrix("float32"), None, lambda y, batch: (y * batch["g"]).sum((1, 2)))
    run = lambda adapter: clipping.clipped_grad_sum(loss, adapter, batch, 1.0, form=form)[:2]  # noqa: E731
    equations = jax.make_jaxpr(run)(adapter).jaxpr.eqns
    first = next(i for i, e in enumerate(equations) if e.primitive.name == "optimization_barrier")
    before = {variable for e in equations[:first] for variable in e.outvars}
    after = {v for e in equations[first + 1 :] for v in e.invars if isinstance(v, type(e.outvars[0]))}
    assert {v.aval.shape for v in before & after} <= {(2,), ()}  # the rows' weights, and numbers
    kept = {v.aval.shape for v in equations[first].outvars}
    assert kept == ({(2, 2, 6, 4), (2, 2, 6, 3), (2, 2, 6, 5)} if form == "ghost" else {(2, 2, 3, 4), (2, 2, 5, 3)})


def test_the_integers_that_are_summed_are_those_of_the_norm():
    arguments = {"a": jnp.ones(2)}, {"a": jnp.ones((2, 3))}
    names = [e.primitive.name for e in jax.make_jaxpr(lambda *a: integers.clipped_sum(*a, 16))(*arguments).jaxpr.eqns]
    assert names.count("optimization_barrier") == 1


def test_the_sum_of_what_was_kept_is_exact():
    assert products(per_row._product, jnp.ones(2), G, X) == [((4, 3), True)]
