"""Clipping per layer and automatic clipping, in every form, against a loop over examples; and what one row can do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import lora
from dplora_jax.models import layers
from dplora_jax.privacy import clipping
from dplora_jax.privacy.clipping import clipped_grad_sum
from tests.conftest import mostly_slow
from tests.privacy.test_clipping import CASES, ONES, loss_of, norm, one_hot, reference, setup

pytestmark = pytest.mark.usefixtures("quick_compile")
WHOLE, FROZEN = "classifier", "language model, frozen A"  # the second one's layers are scanned
RUNS = [
    *((WHOLE, form, mode) for form in ("vmap", "broadcast", "ghost") for mode in ("per_layer", "automatic")),
    *((FROZEN, form, "per_layer") for form in ("broadcast", "ghost")),
]
# Once norms are known, a mode is the same lines whatever made them: each form is tried once, and each mode.
FAST = [(WHOLE, "vmap", "automatic"), (WHOLE, "ghost", "per_layer"), (FROZEN, "broadcast", "per_layer")]
runs = pytest.mark.parametrize(("case", "form", "mode"), mostly_slow(FAST, RUNS))


@functools.cache
def compiled(case, form, mode):
    model = setup(case)[0]

    def run(params, adapter, batch, clip_norm, weights):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "SHALLOW", CASES[case][3])
            return clipped_grad_sum(loss_of(model, params), adapter, batch, clip_norm, weights, form, mode)

    run = jax.jit(run)
    return lambda clip_norm, weights: run(*setup(case)[1:], np.float32(clip_norm), weights)


def parts_of(leaves, adapter):
    """The parts of a gradient by name, by hand: {name: list of arrays}, a matrix of each layer apart and the head as one."""
    parts = {}
    paths = [path for path, _ in jax.tree.leaves_with_path(adapter)]
    for path, leaf in zip(paths, leaves, strict=True):
        if path[0].key == "head":
            parts.setdefault("head", []).append(leaf)
        else:
            for layer, matrix in enumerate(leaf):
                parts.setdefault((path[1].key, layer), []).append(matrix)
    return parts


def norms_of(parts):
    return {name: norm(arrays) for name, arrays in parts.items()}


def test_parts_are_each_matrix_of_each_layer_and_the_head():
    for case, count in (WHOLE, 2 * 3 + 1), (FROZEN, 2 * 3):
        assert lora.groups(setup(case)[2])[0] == count
    assert lora.groups({"a": jnp.ones(2), "b": [jnp.ones(1), jnp.ones(3)]}) == (2, {"a": 0, "b": [1, 1]})


@runs
def test_every_form_is_the_sum_of_a_loop(case, form, mode):
    adapter, (rows, values) = setup(case)[2], reference(case)
    weights = np.array([1, 1, 0.25], np.float32)
    grads = [parts_of(row, adapter) for row in rows]
    sizes = [norms_of(parts) for parts in grads]
    count = len(sizes[0])
    clip_norm = np.median([list(size.values()) for size in sizes]) * count**0.5  # half of the parts are cut
    grad_sum, norms, row_losses = compiled(case, form, mode)(clip_norm, weights)
    total = [np.sqrt(sum(s**2 for s in size.values())) for size in sizes]
    np.testing.assert_allclose(norms, total, rtol=1e-4)
    np.testing.assert_allclose(row_losses, values, rtol=1e-5)
    for name, leaves in parts_of(jax.tree.leaves(grad_sum), adapter).items():
        if mode == "automatic":
            factors = [w * clip_norm / (size + 0.01) for w, size in zip(weights, total, strict=True)]
        else:
            share = clip_norm / count**0.5
            factors = [w * min(1, share / size[name]) for w, size in zip(weights, sizes, strict=True)]
        for index, leaf in enumerate(leaves):
            expected = sum(factor * parts[name][index] for factor, parts in zip(factors, grads, strict=True))
            np.testing.assert_allclose(leaf, expected, atol=2e-5 * clip_norm)


@runs
@pytest.mark.parametrize("clip_norm", [1e-3, 1e4])
def test_no_row_contributes_more_than_clip_norm(case, form, mode, clip_norm):
    """And per layer no part more than its share, which all of them reach where the clip norm is small."""
    adapter = setup(case)[2]
    for row in range(3):
        contribution = compiled(case, form, mode)(clip_norm, one_hot(row))[0]
        assert norm(contribution) <= clip_norm * (1 + 1e-5)
        sizes = norms_of(parts_of(jax.tree.leaves(contribution), adapter))
        if mode == "automatic":
            assert norm(contribution) > 0.5 * clip_norm
        elif clip_norm < 1:
            assert list(sizes.values()) == pytest.approx([clip_norm / len(sizes) ** 0.5] * len(sizes), rel=1e-4)


@runs
def test_a_row_of_weight_zero_adds_nothing(case, form, mode):
    whole, silenced = (compiled(case, form, mode)(0.5, weights) for weights in (ONES, ONES - one_hot(1)))
    assert silenced[1][1] == 0
    alone = compiled(case, form, mode)(0.5, one_hot(1))[0]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a - b, c, atol=1e-5), whole[0], silenced[0], alone)
    assert norm(compiled(case, form, mode)(0.5, 0 * ONES)[0]) == 0


@pytest.mark.parametrize("mode", clipping.MODES)
def test_a_gradient_that_is_not_finite_in_one_part_adds_nothing_to_any(mode):
    adapter = {"a": jnp.ones(2), "b": jnp.zeros(2)}
    batch = {"x": jnp.array([[1.0, 2], [3, 4]]), "y": jnp.array([[1.0, 0], [0, 0]])}

    def loss(adapter, batch):  # in the first row alone, the second part's slope is infinite
        first = batch["y"][:, 0]
        return batch["x"] @ adapter["a"] + first * jnp.sqrt(jnp.abs(batch["y"] @ adapter["b"]) + 1 - first)

    grad_sum, norms, _ = clipped_grad_sum(loss, adapter, batch, 1.0, mode=mode)
    alone = clipped_grad_sum(loss, adapter, batch, 1.0, jnp.array([0.0, 1]), mode=mode)[0]
    assert np.isinf(norms[0])
    jax.tree.map(np.testing.assert_array_equal, grad_sum, alone)
    assert norm(alone) > 0


def test_automatic_clipping_scales_small_gradients_up_and_none_to_more_than_none():
    """|g| = 0.01, the stability constant, is half of clip_norm; a gradient of zero stays one."""
    batch = {"x": jnp.array([[0.006, 0.008], [0, 0]])}
    loss = lambda adapter, batch: batch["x"] @ adapter["a"]  # noqa: E731
    grad_sum = clipped_grad_sum(loss, {"a": jnp.ones(2)}, batch, 3.0, mode="automatic")[0]
    np.testing.assert_allclose(grad_sum["a"], [0.9, 1.2], rtol=1e-5)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="unknown clipping mode 'adaptive'; known: flat, per_layer, automatic"):
        clipped_grad_sum(lambda a, b: b["x"].sum(1), {"a": jnp.ones(2)}, {"x": jnp.ones((2, 3))}, 1.0, mode="adaptive")
