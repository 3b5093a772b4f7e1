"""No record moves the clipped sum by more than its clip norm, whatever it is made of: a short run of `clipping_attack`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import per_row
from dplora_jax.privacy import clipping
from tests.conftest import mostly_slow
from tests.privacy.clipping_attack import DTYPES, FORMS, KINDS, moves, moves_among_others, records, step

BOUND = 1 + 1e-6
SHAPES = {"long": (2, 48, 40, 24, 16), "short": (2, 6, 64, 48, 32)}  # one takes the product, one the Gram matrices
# 4 / 3 is the scale that rounding deceives: tokens that cancel before it leave something after it.
WORST_SCALE = (4 / 3,)
ALL = [(form, dtype, rows) for form in FORMS for dtype in DTYPES for rows in SHAPES]
# Rows' lengths change what "ghost" and "auto" do, and float16 is rounded where bfloat16 is.
FAST = [
    *((form, dtype, "short") for form in ("vmap", "broadcast") for dtype in ("float32", "bfloat16")),
    *(("ghost", dtype, rows) for dtype in ("float32", "bfloat16") for rows in SHAPES),
    *(("auto", "bfloat16", rows) for rows in SHAPES),
]


def attack(form, dtype, rows, scales):
    rng, run, reached = np.random.default_rng(0), step(dtype, form, "flat"), 0.0
    for first in KINDS:
        for second in KINDS:
            adapter, batch = records(rng, (first, second), SHAPES[rows], scales=scales)
            clip_norm = 10.0 ** rng.uniform(-6, 3)
            move = moves(run, adapter, batch, clip_norm).max()
            assert move <= BOUND, (first, second)
            assert moves_among_others(run, adapter, batch, clip_norm).max() <= 1 + 1e-5, (first, second)
            reached = max(reached, move)
    assert reached > 0.9  # the clip norm is met, so that the bound was tried


@pytest.mark.parametrize(("form", "dtype", "rows"), FAST)
def test_no_record_moves_the_sum_by_more_than_the_clip_norm(form, dtype, rows):
    attack(form, dtype, rows, WORST_SCALE)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "dtype", "rows"), ALL)
def test_no_record_moves_the_sum_by_more_than_the_clip_norm_at_any_scale(form, dtype, rows):
    attack(form, dtype, rows, (1.0, 4 / 3, 0.1))


@pytest.mark.parametrize("mode", ["per_layer", "automatic"])
@pytest.mark.parametrize("form", mostly_slow(("vmap", "broadcast", "ghost"), FORMS))
def test_nor_in_another_mode(form, mode):
    rng, run = np.random.default_rng(1), step("bfloat16", form, mode)
    for kind in KINDS:
        adapter, batch = records(rng, (kind, "plain"), SHAPES["short"], scales=WORST_SCALE)
        assert moves(run, adapter, batch, 0.1).max() <= BOUND


def alike(outputs, cotangents, inputs=0.25, scale=1.0):
    """(adapter, batch) of one record whose tokens are `cotangents`, the same for each output, over equal inputs."""
    rng = np.random.default_rng(0)
    adapter, batch = records(rng, ("plain", "plain"), (1, len(cotangents), 64, outputs, 64))
    pair = adapter["layers"]["q"].replace(a=jnp.eye(64)[None], b=jnp.zeros((1, outputs, 64)), scale=scale)
    batch |= {"x": np.full_like(batch["x"], inputs), "g": np.repeat(np.float32(cotangents)[None, :, None], outputs, 2)}
    return {"layers": {"q": pair}}, batch


@pytest.mark.parametrize("form", FORMS)
def test_tokens_that_cancel_before_they_are_rounded_to_bfloat16_are_read_as_rounded(form):
    """96 tokens of v and 64 of -1.5 v cancel; times 4/3 and rounded to bfloat16, they leave 2^-9 of their length."""
    adapter, batch = alike(64, [1.53125] * 96 + [-1.53125 * 1.5] * 64, scale=4 / 3)
    assert moves(step("bfloat16", form, "flat"), adapter, batch, 0.01).max() <= BOUND


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cotangent", [1e-18, 1e-21, 1e-30, 1e-37])
def test_cotangents_whose_squares_vanish_hide_nothing(form, cotangent):
    adapter, batch = alike(64, [cotangent] * 16, inputs=1 / cotangent)
    assert 0.99 < moves(step("float32", form, "flat"), adapter, batch, 1e-3).max() <= BOUND


def test_no_token_is_flushed_to_zero_while_another_that_it_cancels_with_is_not():
    adapter, batch = alike(64, [3e-38] * 96 + [-4.5e-38] * 64, inputs=1e37)
    batch["g"][0, 0] = 1e-35  # what is clipped
    assert moves(step("float32", "ghost", "flat"), adapter, batch, 1e-3).max() <= BOUND


@pytest.mark.parametrize("value", [1e20, 1e30, 3e38])
def test_a_norm_beyond_float32_is_infinite_and_the_row_adds_nothing(value):
    adapter, batch = alike(64, [value] * 4, inputs=1e10)
    for form in FORMS:
        total, norms, _ = step("float32", form, "flat")(adapter, batch, np.float32(1), np.ones(1, np.float32))
        assert np.isinf(norms).all()
        assert not np.asarray(total["layers"]["q"].b).any()


def test_many_equal_squares_do_not_stand_still():
    """2^25 equal numbers, added up one by one in float32, come to half of what they are; and little is added for rounding,
    however long an axis is."""
    for shape in (1, 2**12, 2**13), (1, 2**25):
        squares = per_row.square_sum(jnp.ones(shape))
        assert 2**25 <= float(squares[0]) <= 2**25 * 1.005


@pytest.mark.parametrize("numbers", [per_row.wide, lambda y: per_row.square_sum(per_row.wide(y))])
def test_narrow_numbers_are_read_as_what_they_were_rounded_to(numbers):
    """The same within one program as of the rounded numbers alone, where XLA would leave the rounding out."""
    x = jnp.linspace(1, 2, 1000).reshape(4, 250).astype(jnp.bfloat16)
    scaled = lambda x: x * jnp.bfloat16(4 / 3)  # noqa: E731
    within = jax.jit(lambda x: numbers(scaled(x)))(x)
    np.testing.assert_array_equal(within, jax.jit(numbers)(jax.jit(scaled)(x)))


def test_rows_that_would_leave_too_much_go_through_a_few_at_a_time(monkeypatch):
    adapter, batch = records(np.random.default_rng(0), ("plain", "plain"), (5, 6, 64, 48, 32))
    at_once = step("float32", "auto", "flat")(adapter, batch, np.float32(1e-3), np.ones(5, np.float32))
    turns = []
    monkeypatch.setattr(clipping, "ONE_PASS_BYTES", 1)
    in_turns = clipping.in_turns
    monkeypatch.setattr(clipping, "in_turns", lambda *a: turns.append(a[1]) or in_turns(*a))
    run = step.__wrapped__("float32", "auto", "flat")
    few = run(adapter, batch, np.float32(1e-3), np.ones(5, np.float32))
    assert turns == [1]
    np.testing.assert_allclose(few[0]["layers"]["q"].b, at_once[0]["layers"]["q"].b, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(few[1], at_once[1], rtol=1e-6)
    np.testing.assert_allclose(few[2], at_once[2], rtol=1e-6)


def test_a_row_whose_tokens_cancel_swallows_no_other_rows_share():
    """One sum over all tokens of these 96 rows, in blocks of some hundred, lost four rows of 0.45 for a row that adds nothing."""
    rows, tokens, outputs, inputs = 96, 22, 8, 384
    g = np.full((rows, tokens, outputs), 0.45 / tokens / (outputs * inputs) ** 0.5, np.float32)
    x, unit = np.ones((1, rows, tokens, inputs), np.float32), jnp.ones(rows)
    large = (
        np.where(np.arange(tokens) < tokens // 2, 1, -1)[:, None]
        * 2.0**24
        / (2 * tokens**2)
        / (outputs * inputs) ** 0.5
    )
    run = jax.jit(lambda factors, kept: per_row.kept_sum(factors, kept)[0])
    for row in (13, 27, 50):
        cancels = g.copy()
        cancels[row] = large
        total = run(unit, per_row.Kept(x, cancels[None]))
        without = run(unit.at[row].set(0), per_row.Kept(x, cancels[None]))
        assert np.linalg.norm(np.asarray(total, np.float64) - without) < 1e-4, row


def test_the_sum_of_a_narrow_adapter_is_float32():
    """Rounded to bfloat16 before noise is added, it would move by more than a row's share."""
    batch = {"x": jnp.array([[1.0, 1 / 256], [1 / 512, 0]])}
    total, _, _ = clipping.clipped_grad_sum(
        lambda adapter, batch: batch["x"] @ adapter.astype(jnp.float32), jnp.ones(2, jnp.bfloat16), batch, 10.0
    )
    np.testing.assert_allclose(total, [1 + 1 / 512, 1 / 256], rtol=1e-6)


def test_a_sum_of_squares_is_never_below_the_exact_one():
    y = np.random.default_rng(0).normal(size=(300, 7, 90)).astype(np.float32)
    exact = np.square(y.astype(np.float64)).sum((1, 2))
    read = np.asarray(per_row.square_sum(jnp.asarray(y)), np.float64)
    assert (read >= exact).all()
    assert (read <= exact * (1 + 2e-5)).all()


@pytest.mark.parametrize("outputs", [4, 64], ids=["the product", "Gram matrices"])
def test_a_token_without_a_cotangent_hides_no_other_however_large_its_input(outputs):
    g, x = np.zeros((1, 3, outputs), np.float32), np.full((1, 3, 8), 1e-15, np.float32)
    g[0, 0], x[0, 1] = 1e-10, 1e38
    exact = 8 * outputs * (1e-25) ** 2
    assert float(per_row.squared_norm(g, x, 1e-25)[0]) == pytest.approx(exact / 1e-25**2, rel=1e-4)
