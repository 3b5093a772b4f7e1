"""Classes of sizes: what a client of a class is charged for is what it does, and never more than its budget."""

import itertools

import numpy as np
import pytest

from dplora_jax.privacy import accounting, size_classes

DELTA = 1e-5
MANY = tuple(sorted({round(n) for n in np.geomspace(50, 20_000, 300)}))


@pytest.fixture(scope="module")
def found():
    """Mechanisms of a budget for many sizes, three classes of them to be quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(size_classes, "CLASSES", 3)
        return dict(zip(MANY, accounting.calibrate(MANY, 64, 20, 8.0, DELTA), strict=True))


def test_few_sizes_are_each_their_own():
    sizes = MANY[: size_classes.MOST] * 2
    assert size_classes.bounds_by_size(sizes, 64) == {n: (n, n) for n in sizes}
    assert len(size_classes.bounds_by_size(MANY[: size_classes.MOST + 1], 64)) == size_classes.MOST + 1
    assert len(set(size_classes.bounds_by_size(MANY[: size_classes.MOST + 1], 64).values())) <= size_classes.CLASSES


@pytest.mark.parametrize("expected", [1, 64, 800, 30_000])
@pytest.mark.parametrize("sizes", [MANY, MANY[40:], range(100, 140), [*range(1, 40), 10**6]])
def test_classes_are_few_cover_every_size_and_do_not_overlap(sizes, expected):
    classes = size_classes.bounds_by_size(sizes, expected)
    assert set(classes) == set(sizes)
    assert all(smallest <= size <= largest for size, (smallest, largest) in classes.items())
    ranges = sorted(set(classes.values()))
    assert 1 <= len(ranges) <= size_classes.CLASSES
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))
    assert all(
        largest <= expected or smallest > expected for smallest, largest in ranges
    )  # who joins whole stays whole
    widest = max(np.log(max(sizes) / min(max(sizes), max(min(sizes), expected))) / (size_classes.CLASSES - 1), 0)
    assert all(np.log(b / a) <= widest + 1e-9 for a, b in ranges if a > expected)


def test_order_and_number_of_clients_do_not_matter():
    shuffled = np.random.default_rng(0).permutation(MANY * 2).tolist()
    assert size_classes.bounds_by_size(shuffled, 64) == size_classes.bounds_by_size(MANY, 64)


def test_a_client_is_accounted_with_no_fewer_records_and_no_lower_rate_than_its_own(found):
    """n' >= n records are sampled from, at q' >= q, so that it expects at least the batch that was asked for."""
    for n, mechanism in found.items():
        assert mechanism.records >= n
        assert mechanism.sampling_rate * n >= min(64, n)
    assert len(set(found.values())) == 3
    assert any(mechanism.records > n for n, mechanism in found.items())
    assert {mechanism.sampling_rate for n, mechanism in found.items() if n <= 64} == {1.0}


def test_no_client_of_a_class_exceeds_its_budget(found):
    for mechanism in set(found.values()):
        assert 0.995 * 8 <= accounting.epsilon(mechanism, 20, DELTA) <= 8


def test_no_client_of_a_class_has_less_noise_than_its_own_calibration_says(found):
    """Sampling more often costs more: a client alone needs less, at the top of its class (q is least there) most visibly."""
    for n in (MANY[0], MANY[60], MANY[150], MANY[-1]):
        (alone,) = accounting.calibrate([n], 64, 20, 8.0, DELTA)
        assert found[n].noise_multiplier >= alone.noise_multiplier * 0.998
    assert found[MANY[-1]].noise_multiplier > 1.01 * alone.noise_multiplier


def test_adaptive_and_given_noise_and_parts_take_classes_too(monkeypatch):
    monkeypatch.setattr(size_classes, "CLASSES", 3)
    options = {"delta": DELTA, "steps": 4, "expected_batch_size": 8}
    given = accounting.with_noise(MANY, noise_multiplier=1.1, **options)
    assert len(set(given)) == 2
    assert {m.noise_multiplier for m in given} == {1.1}
    banded = accounting.with_noise(MANY, noise_multiplier=1.1, bands=4, **options)
    assert all(m.part * 4 >= n and m.join_rate <= 1 for m, n in zip(banded, MANY, strict=True))
    adaptive = accounting.with_noise(MANY, noise_multiplier=1.1, adaptive=True, **options)
    assert all(m.count_noise > 0 for m in adaptive)


def test_without_noise_there_is_nothing_to_account_for_and_sizes_stay_exact():
    found = accounting.with_noise(MANY, 64, 1, 0.0, DELTA)
    assert [m.records for m in found] == list(MANY)
    assert [m.sampling_rate for m in found] == [min(1, 64 / n) for n in MANY]
