"""What a client's rounds cost, and the noise that a budget buys: dp_accounting's PLD of the truncated subsampled Gaussian.

Neighbours: one record replaced by a null record (REPLACE_SPECIAL), so that a client's size, rate and capacity are public.
Every epsilon here is an upper bound whatever the grid; a coarser grid only loosens it (1e-2 costs about 0.015 % at epsilon 8).
"""

import dataclasses
import functools
import math

from dp_accounting import privacy_accountant
from dp_accounting.pld import privacy_loss_distribution as pld

from dplora_jax.errors import InputError

NEIGHBOURS = privacy_accountant.NeighboringRelation.REPLACE_SPECIAL
GRID = 1e-3  # of the privacy losses that are reported
CAPACITY_COST = 1e-3  # the share of epsilon that a batch's fixed capacity may cost
NOISE_RANGE = (0.05, 1e4)


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """One client's local step: Poisson sampling of `records` at `sampling_rate` into `capacity` rows, and Gaussian noise of
    `noise_multiplier` times the clipping norm on the sum. All four are public."""

    records: int
    sampling_rate: float
    capacity: int
    noise_multiplier: float


@functools.lru_cache(maxsize=64)
def step_loss(mechanism, grid=GRID):
    """The privacy loss distribution of one step; compose it with `self_compose(steps)`."""
    m = mechanism
    options = {"value_discretization_interval": grid, "neighboring_relation": NEIGHBOURS}
    if m.capacity >= m.records:  # nothing is ever cut off
        return pld.from_gaussian_mechanism(m.noise_multiplier, sampling_prob=m.sampling_rate, **options)
    return pld.from_truncated_subsampled_gaussian_mechanism(
        m.records, m.sampling_rate, m.capacity, m.noise_multiplier, **options
    )


def epsilon(mechanism, steps, delta, grid=GRID):
    """epsilon at `delta` after `steps` local steps.

    >>> round(epsilon(Mechanism(775, 64 / 775, 110, 0.743), 50, 1e-5), 3)
    8.005
    """
    return epsilon_curve(mechanism, (steps,), delta, grid)[0]


@functools.cache
def epsilon_curve(mechanism, steps, delta, grid=GRID):
    """epsilon after each count of the tuple `steps` (0 costs nothing; no noise is infinite) -> tuple of floats."""
    if mechanism.noise_multiplier == 0:
        return tuple(math.inf if count else 0.0 for count in steps)
    one = step_loss(mechanism, grid)
    return tuple(float(one.self_compose(count).get_epsilon_for_delta(delta)) if count else 0.0 for count in steps)


@functools.cache
def composed(parts, delta, grid=GRID):
    """epsilon at `delta` of several mechanisms on the same records: `parts` is a tuple of (Mechanism, steps)."""
    if len(parts) == 1:
        return epsilon(*parts[0], delta, grid)
    if any(mechanism.noise_multiplier == 0 for mechanism, _ in parts):
        return math.inf
    losses = [step_loss(mechanism, grid).self_compose(steps) for mechanism, steps in parts]
    return float(functools.reduce(lambda x, y: x.compose(y), losses).get_epsilon_for_delta(delta))


def sampling_rate(records, expected_batch_size):
    """q = min(1, expected_batch_size / records)."""
    return min(1.0, expected_batch_size / records)


def calibrate(sizes, expected_batch_size, steps, target, delta):
    """The least noise for each client of `sizes` records that keeps `steps` local steps within (target, delta).

    -> a list of Mechanism, in order. Raises InputError where no noise multiplier in NOISE_RANGE would do.
    """
    grid = min(1e-2, max(GRID, target / 400))
    found, guess, spread = {}, 1.0, None
    for size in sorted(set(sizes)):
        rate = sampling_rate(size, expected_batch_size)

        def cost(noise, capacity=size, size=size, rate=rate):
            return epsilon(Mechanism(size, rate, capacity, noise), steps, delta, grid)

        plain = _least_noise(cost, target, guess, tolerance=2e-3)
        capacity, spread = _least_capacity(size, rate, functools.partial(cost, plain), spread)
        noise = (
            plain
            if capacity == size and cost(plain) <= target
            else _least_noise(lambda s, c=capacity, f=cost: f(s, c), target, plain, 5e-4)
        )
        found[size], guess = Mechanism(size, rate, capacity, noise), noise
    return [found[size] for size in sizes]


def with_noise(sizes, expected_batch_size, steps, noise_multiplier, delta):
    """Mechanisms of a given noise multiplier, each with the smallest capacity that costs under CAPACITY_COST of epsilon."""
    found, spread = {}, None
    for size in sorted(set(sizes)):
        rate = sampling_rate(size, expected_batch_size)

        def cost(capacity, size=size, rate=rate):
            return epsilon(Mechanism(size, rate, capacity, noise_multiplier), steps, delta, 1e-2)

        capacity = generous_capacity(size, rate) if noise_multiplier == 0 else None
        if capacity is None:
            capacity, spread = _least_capacity(size, rate, cost, spread)
        found[size] = Mechanism(size, rate, capacity, noise_multiplier)
    return [found[size] for size in sizes]


def least_noise(records, rate, steps, target, delta):
    """The least noise multiplier that keeps `steps` steps of plain Poisson sampling at `rate` within (target, delta).

    Raises InputError where none in NOISE_RANGE would do.
    """
    grid = min(1e-2, max(GRID, target / 400))
    cost = lambda noise: epsilon(Mechanism(records, rate, records, noise), steps, delta, grid)  # noqa: E731
    return _least_noise(cost, target, 1.0, 5e-4)


def generous_capacity(size, rate):
    """The mean and six standard deviations of a Poisson sample's size, and at most all: what a run without noise takes."""
    return min(size, math.ceil(size * rate + 6 * math.sqrt(size * rate * (1 - rate))))


def _least_noise(cost, target, guess, tolerance):
    """The smallest noise with cost <= target, to a relative tolerance, by a secant in logarithms kept inside a bracket."""
    low, high = NOISE_RANGE[0], None
    noise, costs = guess, {}
    for _ in range(60):
        costs[noise] = value = cost(noise)
        if value <= target:
            high = noise
            if value >= target * (1 - tolerance) or high <= low * (1 + tolerance / 4):
                return noise
        else:
            low = noise
        if high is None and noise >= NOISE_RANGE[1]:
            break
        slope = _slope(costs)
        aim = noise * (target * (1 - tolerance / 2) / max(value, 1e-9)) ** (1 / slope)
        inside = low < aim < (high or math.inf)
        noise = aim if inside else math.sqrt(low * high) if high else low * 2
        noise = min(max(noise, NOISE_RANGE[0]), NOISE_RANGE[1])
    raise InputError(
        f"epsilon {target:g} is out of reach: no noise multiplier in {NOISE_RANGE} gives it; raise --epsilon or --delta."
    )


def _slope(costs):
    """d log cost / d log noise from the two last evaluations; -1.5 to begin with."""
    (x0, y0), (x1, y1) = (list(costs.items()) * 2)[-2:]
    if x0 == x1 or min(y0, y1) <= 0 or not math.isfinite(y0 + y1) or y0 == y1:
        return -1.5
    return min(-0.2, math.log(y1 / y0) / math.log(x1 / x0))


def _least_capacity(size, rate, cost, spread):
    """The smallest capacity whose cost is within CAPACITY_COST of no truncation -> (capacity, standard deviations above the
    mean). `spread` is another client's second value: where the search starts."""
    mean, deviation = size * rate, math.sqrt(size * rate * (1 - rate))
    if deviation == 0:
        return size, spread
    limit = cost(size) * (1 + CAPACITY_COST)
    fits = functools.cache(lambda capacity: capacity >= size or cost(capacity) <= limit)
    capacity = min(size, math.ceil(mean + (spread or 5.5) * deviation))
    while not fits(capacity):
        capacity += 1
    stride = max(1, round(deviation / 2))
    while stride:
        while capacity - stride > mean and fits(capacity - stride):
            capacity -= stride
        stride //= 2
    return capacity, (capacity - mean) / deviation
