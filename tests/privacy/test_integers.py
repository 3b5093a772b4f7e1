"""Integer gradients: a row's norm stays within the clip norm in exact arithmetic, whatever floating point does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dplora_jax.errors import InputError
from dplora_jax.privacy import accounting, integers
from dplora_jax.privacy.clipping import clipped_grad_sum
from tests.conftest import mostly_slow
from tests.privacy.test_clipping import loss_of, setup

pytestmark = pytest.mark.usefixtures("quick_compile")
BITS, UNIT = 20, 2**20


def squared(tree, row=None):
    """The sum of squares as a Python integer, exact."""
    leaves = [np.asarray(leaf if row is None else leaf[row]).reshape(-1) for leaf in jax.tree.leaves(tree)]
    return sum(int(np.square(leaf.astype(object)).sum()) for leaf in leaves)


cut = jax.jit(functools.partial(integers.clipped_sum, bits=BITS))
mantissas = st.floats(0.5, 1, width=32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(mantissas, st.integers(-100, 100), st.booleans()), min_size=5, max_size=5),
    st.sampled_from([0.5, 0.999, 1 - 2**-22, 1, 1 + 2**-20, 1.01, 2, 2.0**60, np.inf, np.nan]),
)
def test_no_row_is_beyond_the_clip_norm_even_where_its_factor_is_wrong(numbers, wrong):
    """Coordinates from 2^-100 to 2^100; the factor is right, or off as a bad float norm would leave it."""
    row = np.array([(-1) ** sign * m * 2.0**e for m, e, sign in numbers], np.float32)
    factor = np.float32(wrong * UNIT / np.sqrt((row.astype(float) ** 2).sum()))
    found = cut({"a": factor[None], "b": factor[None]}, {"a": row[None, :2], "b": row[None, 2:].reshape(1, 3, 1)})
    assert found["a"].dtype == jnp.int32
    assert squared(found) <= UNIT**2
    if wrong <= 0.999:
        expected = np.trunc((factor * row).astype(float))
        np.testing.assert_array_equal(np.concatenate([found["a"], found["b"][:, 0]]), expected)


def test_a_row_that_is_surely_within_is_kept_and_one_that_may_not_be_is_dropped():
    for largest, kept in (UNIT - 4, True), (UNIT - 1, True), (UNIT, False):
        found = cut(jnp.ones(1), jnp.array([[largest, 0.0]], jnp.float32))
        assert (np.abs(found).max() == largest) == kept


def test_many_small_coordinates_count_though_a_running_float_sum_would_not_see_them():
    """One large coordinate, and three million of 3: each square is lost beside 2^40 in float32, and together they are beyond."""
    row = np.full((1, 3_000_001), 3, np.float32)
    row[0, 0] = UNIT - 4
    assert np.cumsum(np.square(row, dtype=np.float32), dtype=np.float32)[-1] < UNIT**2
    assert squared(row.astype(int)) > UNIT**2
    assert not np.any(integers.clipped_sum(jnp.ones(1), jnp.asarray(row), BITS))


def test_the_sum_is_exact_in_any_order_and_a_bad_row_adds_nothing():
    rng = np.random.default_rng(0)
    rows = rng.normal(0, UNIT / 60, (50, 1000)).astype(np.float32)
    rows[7, 3] = np.nan
    factors = (np.arange(50) != 7).astype(np.float32)
    total = cut(factors, rows)
    np.testing.assert_array_equal(total, np.trunc(np.delete(rows, 7, 0)).astype(int).sum(0))
    np.testing.assert_array_equal(total, cut(factors[::-1], rows[::-1]))


@functools.cache
def compiled(form, mode, dtype, bits):
    model = setup("classifier", dtype)[0]

    def run(params, adapter, batch, clip_norm, weights):
        return clipped_grad_sum(loss_of(model, params), adapter, batch, clip_norm, weights, form, mode, bits)

    return jax.jit(jax.vmap(run, (None, None, None, None, 0)))


RUNS = [("auto", "flat", jnp.bfloat16), ("auto", "per_layer", jnp.float32), ("vmap", "automatic", jnp.float32)]


@pytest.mark.parametrize(("form", "mode", "dtype"), mostly_slow(RUNS[:1], RUNS))
def test_integer_sums_are_the_float_ones_and_no_row_is_beyond_clip_norm(form, mode, dtype):
    """Each row alone, then all; differences are the margin's and one step of the grid a row."""
    weights = np.concatenate([np.eye(3), np.ones((1, 3))]).astype(np.float32)
    for clip_norm in np.float32(0.02), np.float32(1e3):
        found, exact = (
            compiled(form, mode, dtype, b)(*setup("classifier", dtype)[1:], clip_norm, weights) for b in (BITS, None)
        )
        jax.tree.map(
            lambda z, g, c=clip_norm: np.testing.assert_allclose(z * (c / UNIT), g, atol=c * (3 / UNIT), rtol=2**-11),
            found[0],
            exact[0],
        )
        sizes = [squared(found[0], row) for row in range(3)]
        assert max(sizes) <= UNIT**2
        assert clip_norm > 1 or min(sizes) > (0.98 * UNIT) ** 2
        assert {leaf.dtype for leaf in jax.tree.leaves(found[0])} == {jnp.dtype("int32")}


def test_the_ghost_form_is_refused():
    model, params, adapter, batch = setup("classifier")
    with pytest.raises(ValueError, match="no rows' gradients"):
        clipped_grad_sum(loss_of(model, params), adapter, batch, 1.0, form="ghost", bits=BITS)


@pytest.mark.parametrize(
    ("capacity", "sigma"), [(110, 0.743), (1900, 8.5), (2000, 8.5), (2046, 0.1), (2048, 0.1), (100_000, 2.0)]
)
def test_the_grid_is_the_finest_on_which_int32_cannot_overflow(capacity, sigma):
    bits = integers.bits_for([[accounting.Mechanism(10**6, 0.1, c, sigma)] for c in (1, capacity)])
    assert (capacity + 17 * sigma) * 2**bits < 2**31
    assert bits == 20 or (capacity + 17 * sigma) * 2 ** (bits + 1) >= 2**31


@pytest.mark.parametrize(("capacity", "sigma"), [(110, 0.4), (700, 0.1), (682, 0.02)])
def test_shares_that_are_added_up_share_the_room(capacity, sigma):
    shares = [accounting.Mechanism(10**6, 0.1, capacity, sigma)] * 3
    bits = integers.bits_for([shares])
    assert 3 * (capacity + 17 * sigma) * 2**bits < 2**31
    assert bits == 20 or 3 * (capacity + 17 * sigma) * 2 ** (bits + 1) >= 2**31


def test_shares_of_coarse_noise_are_refused():
    alone = accounting.Mechanism(10**6, 0.1, 40, 31 * 2.0**-20)
    assert integers.bits_for([[alone]]) == 20
    with pytest.raises(InputError, match="32 units"):
        integers.bits_for([[alone, alone]])
    integers.bits_for([[accounting.Mechanism(10**6, 0.1, 40, 32 * 2.0**-20)] * 2])


def test_what_integers_cannot_hold_is_refused():
    with pytest.raises(InputError, match="32-bit"):
        integers.bits_for([[accounting.Mechanism(10**7, 0.1, 10**6, 1.0)]])
    with pytest.raises(InputError, match="lower `rank`"):
        integers.check_size({"a": jax.ShapeDtypeStruct((2**13, 2**13), jnp.float32)})
    with pytest.raises(InputError, match="lower `rank`"):
        jax.eval_shape(cut, *(jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in ((), (2**13, 2**13))))
