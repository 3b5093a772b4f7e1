"""What a client's rounds cost, and the noise that a budget buys: dp_accounting's PLD of the truncated subsampled Gaussian.

Neighbours: one record replaced by a null record (REPLACE_SPECIAL), so that a client's size, rate and capacity are public.
Every epsilon here is an upper bound whatever the grid (a coarser one only loosens it, 1e-2 by about 0.015 % at epsilon 8) and
whatever float64 rounds (`ROUNDING` is taken from delta first).
"""

import dataclasses
import functools
import math

from dp_accounting import dp_event, privacy_accountant
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import rdp_privacy_accountant

from dplora_jax.errors import InputError
from dplora_jax.privacy import noise_search, size_classes

NEIGHBOURS = privacy_accountant.NeighboringRelation.REPLACE_SPECIAL
GRID = 1e-3  # of the privacy losses that are reported
CAPACITY_COST = 1e-3  # the share of epsilon that a batch's fixed capacity may cost
ROUNDING = 2e-14  # what float64 may lose of delta, a composed event (PRIVACY.md, How epsilon is checked)
MOST_NOISE = 1e9  # of a multiplier that is given or kept in a ledger
MOST_STEPS = 10**6  # of a client in all rounds
# Of a step's losses, and of the composed ones by `_coarser`'s measure: a second's work, and some hundred megabytes.
MOST_POINTS = (10**5, 4 * 10**8)
# Between these, float32 squares gradients around a clip norm without underflow: a norm that reads 0 would clip nothing.
CLIP_NORMS = (1e-6, 1e6)


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """One client's local step: Poisson sampling of `records` at `sampling_rate` into `capacity` rows, and Gaussian noise of
    `noise_multiplier` times the clipping norm on the sum. Where a client has fewer (`size_classes`), the rest are null records:
    they join and take rows as others do, and contribute nothing. With adaptive clipping, N(0, count_noise^2) on the centred
    count is released along with it. With `bands` above 1, the noise of as many steps is correlated and each step samples one
    of as many parts of the records, in turn. All of it is public."""

    records: int
    sampling_rate: float  # over all records: the expected batch is sampling_rate * records, whatever the parts
    capacity: int
    noise_multiplier: float
    count_noise: float = 0.0
    bands: int = 1

    @property
    def part(self):
        """How many records, null records included, a step samples from."""
        return -(-self.records // self.bands)

    @property
    def join_rate(self):
        """With what probability each of them joins."""
        return min(1.0, self.sampling_rate * self.bands)

    @property
    def accounted_noise(self):
        """The multiplier of the one Gaussian event that a step is."""
        return joint_multiplier(self.noise_multiplier, self.count_noise) if self.count_noise else self.noise_multiplier

    def charged(self, steps):
        """How many sampled Gaussian events `steps` local steps cost: a record is in one of `bands` parts, and the steps
        between two of its part's cost it nothing (Choquette-Choo et al. 2023, theorem 4)."""
        return -(-steps // self.bands)


def joint_multiplier(noise, count_noise):
    """The multiplier of the gradient's sum (norm at most 1, noise std `noise`) and the centred count (at most 1/2, std
    `count_noise`) as one Gaussian event: (noise^-2 + (2 count_noise)^-2)^-1/2 (Andrew et al. 2021, theorem 1)."""
    return (noise**-2 + (2 * count_noise) ** -2) ** -0.5


@functools.lru_cache(maxsize=64)
def step_loss(mechanism, grid=GRID):
    """The privacy loss distribution of one step; compose it `mechanism.charged(steps)` times."""
    m, noise = mechanism, mechanism.accounted_noise
    options = {"value_discretization_interval": grid, "neighboring_relation": NEIGHBOURS}
    if m.capacity >= m.part:  # nothing is ever cut off
        return pld.from_gaussian_mechanism(noise, sampling_prob=m.join_rate, **options)
    return pld.from_truncated_subsampled_gaussian_mechanism(m.part, m.join_rate, m.capacity, noise, **options)


def epsilon(mechanism, steps, delta, grid=GRID):
    """epsilon at `delta` after `steps` local steps.

    >>> round(epsilon(Mechanism(775, 64 / 775, 110, 0.743), 50, 1e-5), 3)
    8.005
    """
    return epsilon_curve(mechanism, (steps,), delta, grid)[0]


def epsilon_curve(mechanism, steps, delta, grid=GRID):
    """epsilon after each count of the tuple `steps` (0 costs nothing; no noise is infinite) -> tuple of floats."""
    return tuple(_after(mechanism, mechanism.charged(count), delta, grid) for count in steps)


@functools.cache
def _after(mechanism, events, delta, grid):
    """epsilon after so many sampled Gaussian events: clients of one mechanism share what was reckoned for any of them."""
    if not events or mechanism.noise_multiplier == 0:
        return math.inf if events else 0.0
    grid = _coarser(mechanism, events, grid)
    return _at(step_loss(mechanism, grid).self_compose(events), delta, events)


def _at(loss, delta, events):
    """The epsilon of `loss`, of so many events, at what rounding leaves of `delta`; infinite where that is less than half."""
    return math.inf if delta < least_delta(events) else float(loss.get_epsilon_for_delta(delta - ROUNDING * events))


def least_delta(events):
    """The smallest delta at which so many composed events have an epsilon: below, rounding could be half of it."""
    return 2 * ROUNDING * events


def check_delta(delta, events):
    """Raise InputError where float64 cannot account for so many events at `delta`."""
    if delta < least_delta(events):
        raise InputError(
            f"delta={delta:g} is too small for {events} private steps: the accountant's 64-bit arithmetic may be off by "
            f"{ROUNDING * events:.1g}; give {least_delta(events):.2g} or more."
        )


def _coarser(mechanism, events, grid):
    """`grid`, or a coarser one where so many events of so little noise would need more than MOST_POINTS: an upper bound still."""
    if events > 4 * MOST_STEPS:  # repeated attempts included
        raise InputError(f"{events} steps are more than the accountant composes: at most {4 * MOST_STEPS}.")
    mu = 1 / mechanism.accounted_noise  # a record that displaces another moves the sum by twice that
    return max(grid, (4 * mu**2 + 40 * mu) / MOST_POINTS[0], events * 20 * mu / MOST_POINTS[1])


@functools.cache
def composed(parts, delta, grid=GRID):
    """epsilon at `delta` of several mechanisms on the same records: `parts` is a tuple of (Mechanism, steps)."""
    if len(parts) == 1:
        return epsilon(*parts[0], delta, grid)
    if any(mechanism.noise_multiplier == 0 for mechanism, _ in parts):
        return math.inf
    events = [(mechanism, mechanism.charged(steps)) for mechanism, steps in parts if steps]
    grid = max(_coarser(*part, grid) for part in events)
    losses = [step_loss(mechanism, grid).self_compose(count) for mechanism, count in events]
    return _at(functools.reduce(lambda x, y: x.compose(y), losses), delta, sum(count for _, count in events))


def full_epsilon(noises, delta):
    """epsilon at `delta` of Gaussian mechanisms of these noise multipliers (a list) on all of the same records: together they are
    one, whose noise^-2 is the sum of theirs.

    >>> round(full_epsilon([4.0] * 11, 1e-5), 2)
    3.53
    """
    if 0 in noises or not noises:
        return math.inf if noises else 0.0
    return epsilon(Mechanism(1, 1.0, 1, sum(noise**-2 for noise in noises) ** -0.5), 1, delta)


@functools.cache
def renyi_epsilon(mechanism, steps, delta):
    """epsilon of the same steps by Renyi accounting, a looser upper bound by other means: a cross-check, never what is promised.
    It covers plain Poisson sampling (its accountant knows no capacity), so it says nothing of what a capacity costs."""
    if mechanism.noise_multiplier == 0:
        return math.inf if steps else 0.0
    one = dp_event.PoissonSampledDpEvent(mechanism.sampling_rate, dp_event.GaussianDpEvent(mechanism.noise_multiplier))
    accountant = rdp_privacy_accountant.RdpAccountant(neighboring_relation=NEIGHBOURS)
    return float(accountant.compose(one, steps).get_epsilon(delta))


def sampling_rate(records, expected_batch_size):
    """q = min(1, expected_batch_size / records)."""
    return min(1.0, expected_batch_size / records)


def calibrate(sizes, expected_batch_size, steps, target, delta, adaptive=False, count_noise=None, bands=1):
    """The least noise for each client of `sizes` records that keeps `steps` local steps within (target, delta).

    -> a list of Mechanism, in order; many distinct sizes are accounted in classes (`size_classes`). `adaptive` releases a
    centred count too, under noise of std `count_noise` (None chooses it, see `_with_count`). Raises InputError where no noise
    multiplier in `noise_search.NOISE_RANGE` would do, and where `delta` is below `least_delta`.
    """
    check_delta(delta, -(-steps // bands))
    grid = min(1e-2, max(GRID, target / 400))
    classes = size_classes.bounds_by_size(sizes, expected_batch_size)
    by_class, guess, spread = {}, 1.0, None
    for members in sorted(set(classes.values())):
        step = _step(members, expected_batch_size, bands)

        def cost(noise, capacity=step.part, step=step):
            return epsilon(_with_noise(step, noise, capacity), steps, delta, grid)

        plain = noise_search.least(cost, target, guess, tolerance=2e-3)
        capacity, spread = _least_capacity(step.part, step.join_rate, functools.partial(cost, plain), spread)
        noise = (
            plain
            if capacity == step.part and cost(plain) <= target
            else noise_search.least(lambda s, c=capacity, f=cost: f(s, c), target, plain, 5e-4)
        )
        by_class[members], guess = _with_noise(step, noise, capacity), noise
    if adaptive:
        by_class = {members: _with_count(step, count_noise) for members, step in by_class.items()}
    return [by_class[classes[size]] for size in sizes]


def with_noise(sizes, expected_batch_size, steps, noise_multiplier, delta, adaptive=False, count_noise=None, bands=1):
    """Mechanisms of a given noise multiplier, each with the smallest capacity that costs under CAPACITY_COST of epsilon; many
    distinct sizes in classes, as `calibrate` has them, unless there is no noise to account for; InputError as of it."""
    if noise_multiplier:
        check_delta(delta, -(-steps // bands))
    exact = {size: (size, size) for size in sizes}
    classes = size_classes.bounds_by_size(sizes, expected_batch_size) if noise_multiplier else exact
    by_class, spread = {}, None
    for members in sorted(set(classes.values())):
        step = _with_noise(_step(members, expected_batch_size, bands), noise_multiplier, None)
        if adaptive and noise_multiplier:
            share = _count_noise(step, count_noise)
            step = dataclasses.replace(step, count_noise=share)

        def cost(capacity, step=step):
            return epsilon(dataclasses.replace(step, capacity=capacity), steps, delta, 1e-2)

        capacity = generous_capacity(step.part, step.join_rate) if noise_multiplier == 0 else None
        if capacity is None:
            capacity, spread = _least_capacity(step.part, step.join_rate, cost, spread)
        by_class[members] = dataclasses.replace(step, capacity=capacity)
    return [by_class[classes[size]] for size in sizes]


def _step(members, expected_batch_size, bands):
    """The sampling of clients of `members` = (smallest, largest) size, the noise and capacity to be found."""
    smallest, largest = members
    rate = sampling_rate(smallest, expected_batch_size)
    if bands > 1 and rate * bands > 1 + 1e-9:
        raise InputError(
            f"bands={bands} samples each step from one of as many parts of a client's records: {smallest} records have too "
            f"small parts for an expected batch of {expected_batch_size:g}; lower `bands` or `expected_batch_size`."
        )
    return Mechanism(largest, rate, 0, 0.0, bands=bands)


def _with_noise(step, noise, capacity):
    return dataclasses.replace(step, noise_multiplier=noise, capacity=capacity)


def _count_noise(step, count_noise):
    """The std of the noise on the centred count: as given, or a twentieth of the expected batch (Andrew et al. 2021, section
    3.1), and at least 1.5 times the noise multiplier, so that the count takes at most a ninth of a step's privacy."""
    return count_noise or max(step.sampling_rate * step.records / 20, 1.5 * step.noise_multiplier)


def _with_count(step, count_noise):
    """`step` with the same accounted noise, shared between the gradient's sum and a centred count."""
    joint, count = step.noise_multiplier, _count_noise(step, count_noise)
    if 2 * count <= joint * 1.001:
        raise InputError(
            f"count_noise_multiplier={count:g} alone spends the budget, which buys a multiplier of {joint:.3g}: it must be "
            f"well above {joint / 2:.3g}."
        )
    noise = (joint**-2 - (2 * count) ** -2) ** -0.5
    return dataclasses.replace(step, noise_multiplier=noise, count_noise=count)


def least_noise(records, rate, steps, target, delta):
    """The least noise multiplier that keeps `steps` steps of plain Poisson sampling at `rate` within (target, delta); InputError
    as of `calibrate`."""
    check_delta(delta, steps)
    grid = min(1e-2, max(GRID, target / 400))
    cost = lambda noise: epsilon(Mechanism(records, rate, records, noise), steps, delta, grid)  # noqa: E731
    return noise_search.least(cost, target, 1.0, 5e-4)


def generous_capacity(size, rate):
    """The mean and six standard deviations of a Poisson sample's size, and at most all: what a run without noise takes."""
    return min(size, math.ceil(size * rate + 6 * math.sqrt(size * rate * (1 - rate))))


def _least_capacity(size, rate, cost, spread):
    """The smallest capacity whose cost is within CAPACITY_COST of no truncation -> (capacity, standard deviations above the
    mean). `spread` is another client's second value: where the search starts."""
    mean, deviation = size * rate, math.sqrt(size * rate * (1 - rate))
    if deviation == 0:
        return size, spread
    limit = cost(size) * (1 + CAPACITY_COST)
    fits = functools.cache(lambda capacity: capacity >= size or cost(capacity) <= limit)
    capacity = min(size, math.ceil(mean + (spread or 5.5) * deviation))
    stride = max(1, round(deviation / 2))
    while not fits(capacity):
        capacity += stride
    while stride:
        while capacity - stride > mean and fits(capacity - stride):
            capacity -= stride
        stride //= 2
    return capacity, (capacity - mean) / deviation
