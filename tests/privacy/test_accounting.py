"""epsilon against closed forms, another accountant and the design's own figures; calibration against its promises."""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
import scipy.optimize
from scipy.stats import norm

from dplora_jax.errors import InputError
from dplora_jax.privacy import accounting, paper_bound
from dplora_jax.privacy.accounting import Mechanism

DELTA = 1e-5
SIZES = (775, 300, 775, 40, 2000)


def analytic_gaussian(sigma, delta):
    """epsilon of one Gaussian step of sensitivity 1 (Balle and Wang 2018, theorem 8)."""

    def excess(epsilon):
        head, tail = norm.logcdf(0.5 / sigma - epsilon * sigma), norm.logcdf(-0.5 / sigma - epsilon * sigma)
        return math.exp(head) - math.exp(epsilon + tail) - delta

    return scipy.optimize.brentq(excess, 0, 500, xtol=1e-10)


def gaussian_delta(mu, epsilon):
    """delta at epsilon of Gaussian steps whose total is mu = sqrt(steps) / sigma (Balle and Wang 2018, theorem 8)."""
    return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))


def sampled_loss_at(loss, rate, sigma):
    """The x at which log((1 - q) + q N(1) / N(0)) is `loss`; it rises from log(1 - q) at x = -inf."""
    excess = np.maximum(np.expm1(loss) + rate, 0) / rate
    with np.errstate(divide="ignore"):
        return sigma**2 * np.log(excess) + 0.5


def sampled_delta(rate, sigma, epsilon, order):
    """delta at epsilon of one Poisson-sampled Gaussian step, exactly: of the mixture P against the null Q = N(0, sigma^2) where
    the record is there ("with"), of Q against P where it is the other way round ("without")."""

    def masses(x):  # P and Q beyond x
        q = norm.sf(x / sigma)
        return (1 - rate) * q + rate * norm.sf((x - 1) / sigma), q

    if order == "with":
        p, q = masses(sampled_loss_at(epsilon, rate, sigma))
        return p - math.exp(epsilon) * q
    p, q = masses(sampled_loss_at(-epsilon, rate, sigma))
    return (1 - q) - math.exp(epsilon) * (1 - p)


def epsilon_from_below(rate, sigma, steps, delta, order, grid=2e-4, span=100.0):
    """A lower bound on the exact epsilon of Poisson-sampled Gaussian steps, near it: each step's privacy loss rounded DOWN to a
    grid, its law convolved `steps` times by FFT, what lies outside [-span, span) left out."""
    size = round(2 * span / grid)
    edges = (np.arange(size + 1) - size // 2) * grid
    if order == "with":
        x = sampled_loss_at(edges, rate, sigma)
        cdf = (1 - rate) * norm.cdf(x / sigma) + rate * norm.cdf((x - 1) / sigma)
        law = np.diff(cdf)
    else:
        law = np.diff(norm.sf(sampled_loss_at(-edges, rate, sigma) / sigma))
    law = np.fft.irfft(np.fft.rfft(np.fft.ifftshift(law)) ** steps, size)
    law = np.maximum(np.fft.fftshift(law), 0)
    low, high = 0.0, span
    while high - low > 1e-6:
        middle = (low + high) / 2
        above = edges[:-1] > middle
        spent = (law[above] * -np.expm1(middle - edges[:-1][above])).sum()
        low, high = (middle, high) if spent > delta else (low, middle)
    return low


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


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (4.0, 10), (40.0, 1000)])
def test_full_batches_follow_the_exact_delta_at_every_epsilon(sigma, steps):
    loss = accounting.step_loss(Mechanism(50, 1.0, 50, sigma)).self_compose(steps)
    for epsilon in (0.0, 0.25, 1.0, 3.0, 5.0):
        found, slack = loss.get_delta_for_epsilon(epsilon), 5e-3
        assert gaussian_delta(math.sqrt(steps) / sigma, epsilon) - 1e-12 <= found
        assert found <= gaussian_delta(math.sqrt(steps) / sigma, epsilon - slack)


@pytest.mark.parametrize(("rate", "sigma"), [(0.01, 0.6), (0.2, 1.0), (0.9, 2.0)])
def test_one_sampled_step_follows_the_exact_delta_of_both_orders_of_neighbours(rate, sigma):
    """The orders differ where q < 1, each has its own distribution, and what is charged is the dearer one."""
    loss = accounting.step_loss(Mechanism(50, rate, 50, sigma))
    for epsilon in (0.02, 0.1, 0.5, 1.0):
        charged = loss.get_delta_for_epsilon(epsilon)
        for order, pmf in (("with", loss._pmf_remove), ("without", loss._pmf_add)):
            found = pmf.get_delta_for_epsilon(epsilon)
            assert sampled_delta(rate, sigma, epsilon, order) - 1e-12 <= found <= charged
            assert found <= sampled_delta(rate, sigma, epsilon - 2e-3, order) + 1e-12


@pytest.mark.parametrize(("size", "sigma", "steps"), [(775, 0.743, 50), (300, 1.2, 50), (2000, 0.6, 20), (100, 3.0, 1)])
def test_many_sampled_steps_lie_between_an_optimistic_count_and_renyi_accounting(size, sigma, steps):
    """Below: a convolution of our own, rounded down, in both orders of neighbours. Above: another accountant."""
    rate = accounting.sampling_rate(size, 64)
    mechanism = Mechanism(size, rate, size, sigma)
    found = accounting.epsilon(mechanism, steps, DELTA)
    below = [epsilon_from_below(rate, sigma, steps, DELTA, order) for order in ("with", "without")]
    assert max(below) <= found <= 1.005 * max(below) + 1e-2
    upper = accounting.renyi_epsilon(mechanism, steps, DELTA)
    assert 0.6 * upper < found <= upper


def test_a_capacity_that_hardly_ever_binds_costs_nothing():
    rate, plain = 64 / 2000, Mechanism(2000, 64 / 2000, 2000, 0.8)
    spent = accounting.epsilon(plain, 50, DELTA)
    far = accounting.epsilon(Mechanism(2000, rate, 64 + 90, 0.8), 50, DELTA)
    near = accounting.epsilon(Mechanism(2000, rate, 64 + 32, 0.8), 50, DELTA)
    assert far == pytest.approx(spent, rel=1e-4)
    assert spent * 1.0005 < near


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
        accounting.calibrate((20,), 64, 5000, target, 1e-9)


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


def test_the_papers_form_is_no_guarantee():
    """The paper's setting costs what it says and more; where all is known, full batches, it lies below the exact epsilon."""
    assert paper_bound.epsilon(8 / 775, 2.0, 50, DELTA) == pytest.approx(8 / 775 * math.sqrt(50 * math.log(1e5)) / 2)
    assert paper_bound.epsilon(1.0, 20.0, 100, DELTA) < analytic_gaussian(2.0, DELTA)
    claimed = paper_bound.sentence([Mechanism(775, 8 / 775, 22, 2.0)], 50, DELTA)
    assert "epsilon 0.124" in claimed
    assert "not a guarantee" in claimed
    assert accounting.epsilon(Mechanism(775, 8 / 775, 775, 2.0), 50, DELTA) > 0.124


@pytest.mark.parametrize(("records", "rate", "steps", "target"), [(5, 1.0, 50, 8.0), (100, 0.1, 20, 1.0)])
def test_least_noise_keeps_plain_sampling_within_its_budget_and_spends_it(records, rate, steps, target):
    noise = accounting.least_noise(records, rate, steps, target, DELTA)
    assert 0.998 * target < accounting.epsilon(Mechanism(records, rate, records, noise), steps, DELTA) <= target


def test_steps_that_need_too_many_points_are_reckoned_on_a_coarser_grid_which_is_an_upper_bound():
    """Full batches, which have an exact curve. More steps than any run has are refused."""
    for noise, steps in ((0.05, 1), (40.0, 1_000_000)):
        assert accounting._coarser(Mechanism(100, 1.0, 100, noise), steps, accounting.GRID) > accounting.GRID
        exact = analytic_gaussian(noise / math.sqrt(steps), 1e-5)
        assert exact <= accounting.epsilon(Mechanism(100, 1.0, 100, noise), steps, 1e-5) <= exact * 1.01
    with pytest.raises(InputError, match="more than the accountant composes"):
        accounting.epsilon(Mechanism(100, 1.0, 100, 1e3), 10**9, 1e-5)
