"""epsilon against closed forms, another accountant and the design's own figures; calibration against its promises."""

import itertools
import math

import dp_accounting
import pytest
import scipy.optimize
from dp_accounting.rdp import rdp_privacy_accountant
from scipy.stats import norm

from dplora_jax.errors import InputError
from dplora_jax.privacy import accounting
from dplora_jax.privacy.accounting import Mechanism

DELTA = 1e-5
SIZES = (775, 300, 775, 40, 2000)


def analytic_gaussian(sigma, delta):
    """epsilon of one Gaussian step of sensitivity 1 (Balle and Wang 2018, theorem 8)."""

    def excess(epsilon):
        head, tail = norm.logcdf(0.5 / sigma - epsilon * sigma), norm.logcdf(-0.5 / sigma - epsilon * sigma)
        return math.exp(head) - math.exp(epsilon + tail) - delta

    return scipy.optimize.brentq(excess, 0, 500, xtol=1e-10)


@pytest.fixture(scope="module")
def calibrated():
    return accounting.calibrate(SIZES, 64, 50, 8.0, DELTA)


@pytest.mark.parametrize(
    ("capacity", "expected", "digits"), [(775, 8.0049, 4), (110, 8.0049, 4), (100, 8.022, 3), (90, 9.37, 2)]
)
def test_the_figures_of_the_design(capacity, expected, digits):
    """PRIVACY.md's: n 775, expected batch 64, sigma 0.743, 50 steps, delta 1e-5."""
    assert round(accounting.epsilon(Mechanism(775, 64 / 775, capacity, 0.743), 50, DELTA), digits) == expected


def test_neighbours_are_a_record_and_a_null_record_in_its_place():
    """Sizes stay public. Adding or removing one costs the same here; replacing one by another costs more."""
    assert accounting.NEIGHBOURS is dp_accounting.NeighboringRelation.REPLACE_SPECIAL


@pytest.mark.parametrize(("sigma", "steps"), [(0.8, 1), (2.0, 1), (12.0, 1), (4.0, 16), (20.0, 100)])
def test_full_batches_follow_the_exact_curve_of_the_gaussian(sigma, steps):
    """Sensitivity 1 in units of the clipping norm, and n steps of sigma are one of sigma / sqrt(n)."""
    exact = analytic_gaussian(sigma / math.sqrt(steps), DELTA)
    found = accounting.epsilon(Mechanism(50, 1.0, 50, sigma), steps, DELTA)
    assert exact - 1e-9 <= found <= exact + 2e-3


@pytest.mark.parametrize(("size", "sigma", "steps"), [(775, 0.743, 50), (300, 1.2, 50), (2000, 0.6, 20), (100, 3.0, 1)])
def test_renyi_accounting_is_an_upper_bound_not_far_above(size, sigma, steps):
    rate = accounting.sampling_rate(size, 64)
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    accountant = rdp_privacy_accountant.RdpAccountant(neighboring_relation=accounting.NEIGHBOURS)
    upper = accountant.compose(dp_accounting.SelfComposedDpEvent(event, steps)).get_epsilon(DELTA)
    assert 0.6 * upper < accounting.epsilon(Mechanism(size, rate, size, sigma), steps, DELTA) <= upper


def test_a_capacity_costs_more_the_smaller_it_is_and_nothing_when_large():
    costs = [accounting.epsilon(Mechanism(300, 0.2, c, 1.0), 20, DELTA) for c in (300, 299, 90, 75, 65, 60)]
    assert costs[1] == pytest.approx(costs[0], rel=1e-4)
    assert costs[0] <= costs[1] * (1 + 1e-6)
    assert costs[1:] == sorted(costs[1:])
    assert costs[-1] > 1.2 * costs[0]


def test_no_epsilon_is_below_that_of_a_finer_grid():
    """So that the coarse grid of a calibration never buys too little noise."""
    for mechanism in Mechanism(775, 64 / 775, 100, 0.743), Mechanism(300, 0.2, 300, 1.0), Mechanism(50, 1.0, 50, 5.0):
        fine, usual, coarse = (accounting.epsilon(mechanism, 50, DELTA, grid) for grid in (5e-4, 1e-3, 1e-2))
        assert fine <= usual * (1 + 1e-9) <= coarse * (1 + 2e-9)
        assert coarse < fine * 1.001 + 1e-2


def test_calibrated_noise_spends_the_budget_and_never_more(calibrated):
    for mechanism in calibrated:
        assert 0.995 * 8 <= accounting.epsilon(mechanism, 50, DELTA) <= 8


@pytest.mark.parametrize("target", [0.5, 2.0])
def test_calibration_reaches_small_budgets_too(target):
    for mechanism in accounting.calibrate((120, 500), 40, 30, target, 1e-6):
        assert 0.995 * target <= accounting.epsilon(mechanism, 30, 1e-6) <= target


def test_a_capacity_costs_under_a_thousandth_and_is_the_smallest_that_does(calibrated):
    """The search's own grid (1e-2) decides: with 2 rows fewer, the cost is above a thousandth on the fine one too."""
    for m in {m for m in calibrated if m.capacity < m.records}:
        costs = [
            accounting.epsilon(Mechanism(m.records, m.sampling_rate, c, m.noise_multiplier), 50, DELTA)
            for c in (m.records, m.capacity, m.capacity - 2)
        ]
        assert costs[1] <= costs[0] * 1.0011
        assert costs[2] > costs[0] * 1.0009


def test_calibration_keeps_the_order_and_equal_sizes_are_alike(calibrated):
    assert [m.records for m in calibrated] == list(SIZES)
    assert calibrated[0] is calibrated[2]
    for mechanism in calibrated[1:4:2]:
        (alone,) = accounting.calibrate((mechanism.records,), 64, 50, 8.0, DELTA)
        assert alone.noise_multiplier == pytest.approx(mechanism.noise_multiplier, rel=5e-3)


def test_an_expected_batch_above_the_records_takes_all_of_them(calibrated):
    small = calibrated[3]
    assert (small.records, small.sampling_rate, small.capacity) == (40, 1.0, 40)
    assert accounting.sampling_rate(40, 64) == 1.0
    assert accounting.sampling_rate(128, 64) == 0.5


@pytest.mark.parametrize("target", [1e-7, 1e-5])
def test_an_unreachable_budget_is_refused_in_one_sentence(target):
    with pytest.raises(InputError, match="out of reach"):
        accounting.calibrate((20,), 64, 5000, target, 1e-12)


def test_the_curve_rises_with_the_steps_and_starts_at_nothing():
    mechanism, counts = Mechanism(300, 0.2, 85, 1.0), (0, 1, 2, 5, 20, 21, 100)
    curve = accounting.epsilon_curve(mechanism, counts, DELTA)
    assert curve[0] == 0
    assert all(x < y for x, y in itertools.pairwise(curve))
    assert curve[4] == accounting.epsilon(mechanism, 20, DELTA)


def test_given_noise_gets_the_smallest_cheap_capacity():
    first, second, third = accounting.with_noise((775, 30, 775), 64, 50, 0.743, DELTA)
    assert first == third
    assert first.noise_multiplier == second.noise_multiplier == 0.743
    assert (second.sampling_rate, second.capacity) == (1.0, 30)
    plain = accounting.epsilon(Mechanism(775, 64 / 775, 775, 0.743), 50, DELTA)
    assert accounting.epsilon(first, 50, DELTA) <= plain * 1.0011
    assert first.capacity < 110


def test_without_noise_epsilon_is_infinite_and_a_batch_has_room():
    (mechanism,) = accounting.with_noise((775,), 64, 50, 0.0, DELTA)
    assert accounting.epsilon_curve(mechanism, (0, 1, 50), DELTA) == (0.0, math.inf, math.inf)
    assert accounting.composed(((mechanism, 1), (Mechanism(775, 0.1, 775, 1.0), 1)), DELTA) == math.inf
    assert 100 < mechanism.capacity < 120


def test_composition_adds_steps_and_exceeds_its_parts():
    one, other = Mechanism(300, 0.2, 85, 1.0), Mechanism(300, 0.2, 300, 2.0)
    parts = accounting.composed(((one, 20), (one, 30)), DELTA)
    assert parts == pytest.approx(accounting.epsilon(one, 50, DELTA), rel=1e-6)
    mixed = accounting.composed(((one, 20), (other, 30)), DELTA)
    single = accounting.epsilon(one, 20, DELTA), accounting.epsilon(other, 30, DELTA)
    assert max(single) < mixed < sum(single)
    assert mixed < parts
    assert accounting.composed(((one, 20),), DELTA) == single[0]


def test_full_batches_of_two_noises_compose_as_the_gaussian_does():
    """1 / sigma^2 adds up."""
    parts = (Mechanism(50, 1.0, 50, 4.0), 3), (Mechanism(50, 1.0, 50, 6.0), 2)
    exact = analytic_gaussian((3 / 16 + 2 / 36) ** -0.5, DELTA)
    assert exact - 1e-9 <= accounting.composed(parts, DELTA) <= exact + 2e-3


@pytest.mark.parametrize(("records", "rate", "steps", "target"), [(5, 1.0, 50, 8.0), (100, 0.1, 20, 1.0)])
def test_least_noise_keeps_plain_sampling_within_its_budget_and_spends_it(records, rate, steps, target):
    noise = accounting.least_noise(records, rate, steps, target, DELTA)
    assert 0.998 * target < accounting.epsilon(Mechanism(records, rate, records, noise), steps, DELTA) <= target
