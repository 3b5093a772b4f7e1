"""Clipping of units of several rows: in every form the mean gradient of a unit's rows is cut once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import losses
from dplora_jax.privacy.clipping import clipped_grad_sum
from tests.conftest import mostly_slow
from tests.federation import small

pytestmark = pytest.mark.usefixtures("quick_compile")
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
G = 3


@functools.cache
def batch(units_=4, rows=G, seed=0):
    """Units of 1 to `rows` rows, as the device gathers them."""
    rng = np.random.default_rng(seed)
    shape = units_, rows
    brought = (np.arange(rows) < rng.integers(1, rows + 1, (units_, 1))).astype(np.float32)
    return {
        "input_ids": rng.integers(0, 20, (*shape, 6)).astype(np.int32),
        "attention_mask": np.ones((*shape, 6), np.int32),
        "labels": rng.integers(0, 3, shape).astype(np.int32),
        "scale": rng.uniform(0.2, 30, shape).astype(np.float32),
        losses.BROUGHT: brought,
    }


@functools.cache
def clipped(form, mode="flat", **options):
    model, params = small.model_and_params()
    loss = losses.of_units(small.loss, model, params)
    return jax.jit(
        lambda adapter, batch, clip: clipped_grad_sum(loss, adapter, batch, clip, form=form, mode=mode, **options)
    )


def norm(tree):
    return np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree)))


@functools.cache
def by_definition():
    """Each unit's gradient, float64, and loss: of the mean of its rows' losses, one row of the model at a time."""
    model, params = small.model_and_params()
    one = jax.jit(jax.value_and_grad(lambda a, row: small.loss(model, params)(a, row)[0]))
    grads, values = [], []
    for u in range(4):
        brought = int(batch()[losses.BROUGHT][u].sum())
        parts = [
            one(small.adapter(), {n: x[u, g : g + 1] for n, x in batch().items() if n != losses.BROUGHT})
            for g in range(brought)
        ]
        grads.append(
            jax.tree.map(lambda *x: np.mean([np.asarray(y, np.float64) for y in x], 0), *(g for _, g in parts))
        )
        values.append(np.mean([v for v, _ in parts]))
    return grads, values


@pytest.mark.parametrize("form", ["vmap", "broadcast", "ghost"])
def test_every_form_clips_the_mean_gradient_of_a_units_rows(form):
    grads, values = by_definition()
    norms = np.array([norm(g) for g in grads])
    clip = float(np.sort(norms)[1])
    total, shown, of_units = clipped(form)(small.adapter(), batch(), clip)
    close(shown, norms, rtol=1e-4)
    close(of_units, values)
    factors = np.minimum(1, clip / norms)
    expected = jax.tree.map(lambda *x: sum(f * y for f, y in zip(factors, x, strict=True)), *grads)
    jax.tree.map(functools.partial(close, atol=1e-4 * clip), total, expected)


@pytest.mark.parametrize("mode", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("form", mostly_slow(["ghost"], ["vmap", "broadcast", "ghost"]))
def test_a_unit_moves_the_sum_by_no_more_than_the_clip_norm(form, mode):
    """Whatever its rows are: other rows, huge ones, rows that agree, more or fewer of them."""
    clip, rng = 0.1, np.random.default_rng(1)
    run = clipped(form, mode)
    null = {name: array.copy() for name, array in batch().items()}
    null[losses.BROUGHT][1] = 0
    without = run(small.adapter(), null, clip)[0]
    moved = []
    for attempt in range(20):
        changed = {name: array.copy() for name, array in batch().items()}
        changed["input_ids"][1] = rng.integers(0, 20, (1, 6)) if attempt % 2 else rng.integers(0, 20, (G, 6))
        changed["scale"][1] = 10.0 ** rng.uniform(-3, 6)
        changed[losses.BROUGHT][1] = np.arange(G) < rng.integers(1, G + 1)
        after = run(small.adapter(), changed, clip)[0]
        moved.append(norm(jax.tree.map(jnp.subtract, after, without)))
    assert max(moved) <= clip * (1 + 1e-5)
    assert max(moved) > 0.9 * clip


def test_integer_sums_clip_units_too():
    total, _, _ = clipped("auto", bits=12)(small.adapter(), batch(), 0.1)
    plain, _, _ = clipped("broadcast")(small.adapter(), batch(), 0.1)
    jax.tree.map(lambda i, x: close(i * 0.1 * 2.0**-12, x, atol=4 * 0.1 * 2.0**-11), total, plain)


@pytest.mark.parametrize("broken", [np.inf, np.nan])
def test_a_row_that_is_not_finite_silences_its_unit_alone(broken):
    hurt = batch() | {"scale": batch()["scale"].copy()}
    hurt["scale"][1, 0] = broken
    null = batch() | {losses.BROUGHT: batch()[losses.BROUGHT].copy()}
    null[losses.BROUGHT][1] = 0
    for form in ("vmap", "broadcast", "ghost"):
        jax.tree.map(close, *(clipped(form)(small.adapter(), rows, 0.5)[0] for rows in (hurt, null)))


def test_a_loss_of_ones_own_is_taken_by_unit():
    """Not a ModelLoss: each unit as a batch of one."""
    own = lambda model, params: lambda a, rows: (rows["x"] @ a["head"]).sum(-1)  # noqa: E731
    loss = losses.of_units(own, None, None)
    rows = {
        "x": np.arange(12.0, dtype=np.float32).reshape(2, 3, 2),
        losses.BROUGHT: np.array([[1, 1, 0], [1, 0, 0]], np.float32),
    }
    total, shown, _ = clipped_grad_sum(loss, {"head": np.ones((2, 2), np.float32)}, rows, 1e3)
    means = np.array([rows["x"][0, :2].mean(0), rows["x"][1, 0]])
    close(total["head"], np.broadcast_to(means.sum(0)[:, None], (2, 2)))
    close(shown, [np.sqrt(2) * np.linalg.norm(m) for m in means])
