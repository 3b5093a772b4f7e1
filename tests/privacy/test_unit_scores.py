"""What a unit adds to a score is bounded whatever its rows say, and noise covers it."""

import dataclasses

import numpy as np
import pytest
import scipy.stats

from dplora_jax.privacy import unit_scores

KINDS = [unit_scores.Labels(3), unit_scores.Losses(10.8)]
BITS = 20


def outcomes(kind, rows, rng):
    """What `rows` rows may say, the strangest included."""
    if isinstance(kind, unit_scores.Labels):
        return rng.integers(0, 9, rows)
    return rng.choice([0.0, 10.8, 1e9, -5.0, np.nan, np.inf, -np.inf, 3.1, 5.4], rows)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_a_unit_moves_the_sum_by_at_most_one_however_many_rows_it_has(kind):
    rng = np.random.default_rng(0)
    for rows in (1, 2, 3, 50):
        for _ in range(50):
            said = outcomes(kind, rows, rng)
            alone = unit_scores.total(kind, said, np.zeros(rows, int), BITS).astype(object)
            assert 0 < (alone**2).sum() <= 4**BITS


def test_the_sum_over_units_is_that_of_each_alone():
    rng = np.random.default_rng(1)
    units = rng.integers(0, 3000, 5000)
    for kind in KINDS:
        said = outcomes(kind, len(units), rng)
        each = [unit_scores.total(kind, said[units == u], units[units == u], BITS) for u in np.unique(units)]
        assert np.array_equal(unit_scores.total(kind, said, units, BITS), np.sum(each, 0))


def test_records_are_counted_exactly():
    kind, said = unit_scores.Labels(2), np.array([0, 0, 1, 3, 3, 3])
    assert (unit_scores.total(kind, said, np.arange(6), BITS) / 2**BITS).tolist() == [2, 1, 0, 3]


@dataclasses.dataclass(frozen=True)
class TooLong:
    """A kind of score that breaks its promise of norm 1 for one unit, and keeps it for another."""

    size: float
    width = 2

    def of_units(self, outcomes, unit, counts):
        return np.array([[self.size, self.size], [0.6, 0.8]])


@pytest.mark.parametrize("size", [0.8, 1.0, 2.0, 1e6, 1e14, 1e300, np.nan, np.inf])
def test_a_unit_that_would_add_more_than_norm_one_adds_nothing(size):
    """What bounds the sensitivity is not the kind of score but the integers that are summed."""
    summed = unit_scores.total(TooLong(size), np.zeros(2), np.arange(2), BITS)
    assert np.array_equal(summed, np.trunc(np.array([0.6, 0.8]) * 2**BITS))


@pytest.mark.parametrize("noise", [0.3, 7.0, 9000.0])
def test_noise_std_is_the_multiplier_on_the_grid(noise):
    """False alarm below 1e-6: 400 standard deviations of a normal, by chi-square."""
    bits = unit_scores.grid_bits(noise)
    drawn = np.concatenate([unit_scores.noisy(np.zeros(4, np.int64), noise, bits, bytes([i]) * 32) for i in range(100)])
    square = ((drawn / (noise * 2.0**bits)) ** 2).sum()
    assert 1e-6 < scipy.stats.chi2.cdf(square, 400) < 1 - 1e-6
    assert len(np.unique(drawn)) > 390


def test_the_same_key_draws_the_same_noise_and_another_key_other_noise():
    draw = lambda byte: unit_scores.noisy(np.zeros(9, np.int64), 5.0, BITS, byte * 32)  # noqa: E731
    assert np.array_equal(draw(b"a"), draw(b"a"))
    assert (draw(b"a") != draw(b"b")).all()


def test_no_draw_leaves_int32():
    """host_noise goes out to 16.1 standard deviations."""
    for noise in (0.05, 1.0, 37.0, 1e4, 1e6):
        assert 16.1 * noise * 2.0 ** unit_scores.grid_bits(noise) < 2**31
        assert noise * 2.0 ** unit_scores.grid_bits(noise) > 32, "shares that are added up would be too rough"


def test_a_loss_that_is_no_number_is_the_largest():
    kind = unit_scores.Losses(8.0)
    totals = [unit_scores.total(kind, np.array([loss]), np.zeros(1, int), BITS) for loss in (np.nan, np.inf, 9.0, 8.0)]
    assert all(np.array_equal(total, totals[-1]) for total in totals)


def test_without_noise_scores_are_exact():
    labels = unit_scores.Labels(2)
    counts = unit_scores.total(labels, np.array([0, 0, 1, 3]), np.arange(4), BITS) / 2**BITS
    found = labels.metrics(counts, 4, 0.0)
    assert found["accuracy"][0] == pytest.approx(0.75)
    assert found["macro_f1"][0] == pytest.approx((0.8 + 2 / 3) / 2)
    losses = unit_scores.Losses(8.0)
    sums = unit_scores.total(losses, np.array([1.0, 2.0, 6.0]), np.arange(3), BITS) / 2**BITS
    assert losses.metrics(sums, 3, 0.0)["perplexity"][0] == pytest.approx(np.exp(3), rel=1e-4)
