"""The host's noise: exactly rounded normals from the operating system's secrets, and no draw twice.

Keys are fixed, so a passing test always passes; false-alarm rates are over another choice of keys.
"""

import hashlib

import mpmath
import numpy as np
import pytest
import scipy.stats

from dplora_jax.privacy import host_noise, sampling, secrets

KEY = hashlib.sha256(b"test").digest()
SECRETS = secrets.from_seed(0, 3)
TREE = {"a": np.zeros((2, 8)), "b": np.zeros(16)}
NONE, ALL = (lambda _: bytes(16)), (lambda _: b"\xff" * 16)


def tail_beyond(x):
    return mpmath.erfc(x / mpmath.sqrt(2)) / 2


@pytest.fixture(autouse=True)
def digits():
    with mpmath.workdps(80):
        yield


@pytest.mark.parametrize("std", [0.3, 2.7])
def test_integers_have_the_probabilities_of_a_rounded_normal(std):
    """A chi-square test; false alarms: 1e-4 each."""
    draws = host_noise.rounded_normal(KEY, 200_000, std)
    values = np.arange(-20, 21)
    expected = len(draws) * (scipy.stats.norm.cdf((values + 0.5) / std) - scipy.stats.norm.cdf((values - 0.5) / std))
    seen = np.array([(draws == value).sum() for value in values])
    likely = expected > 5
    assert seen[~likely].sum() < 100
    assert (
        scipy.stats.chisquare(seen[likely], expected[likely] * seen[likely].sum() / expected[likely].sum()).pvalue
        > 1e-4
    )


def test_on_a_fine_grid_they_follow_the_normal_distribution():
    """Kolmogorov and Smirnov's test and the first four moments; false alarms: 1e-4 and 5 standard errors each."""
    draws = host_noise.rounded_normal(KEY, 400_000, 1.3 * 2**20)
    assert draws.dtype == np.int32
    x = draws / (1.3 * 2**20)
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-4
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 5 * np.sqrt(spread / x.size), power


@pytest.mark.parametrize("std", [0.7, 1.3 * 2**20, 2.0**26])
def test_every_word_is_rounded_as_exact_arithmetic_rounds_it(std):
    """Words of all magnitudes, the extreme ones included: 2^-193 is 16.1 deviations out."""
    rng = np.random.default_rng(1)
    words = [rng.integers(2 ** max(e - 1, 0), 2**e, 8, np.uint64, endpoint=True) for e in range(63)]
    words = np.concatenate([*words, np.array([0, 1, 2**64 - 1, 2**64 - 2, 2**63], np.uint64)])
    for more in NONE, ALL:
        for word, m in zip(words, host_noise.from_words(words, std, more), strict=True):
            p = (mpmath.mpf(int(word) >> 1) + (0 if more is NONE else 1)) / 2**64
            p += (1 if more is NONE else -1) * mpmath.mpf(2) ** -193
            assert m == 0 or (m < 0) == (int(word) & 1)
            size = abs(int(m))
            assert tail_beyond((size + 0.5) / mpmath.mpf(std)) < p
            assert size == 0 or p <= tail_beyond((size - 0.5) / mpmath.mpf(std))
    assert host_noise.from_words(np.zeros(1, np.uint64), 2.0**20, NONE)[0] / 2**20 == pytest.approx(16.13, abs=0.01)
    assert abs(host_noise.from_words(np.ones(1, np.uint64), 2.0**20, ALL)[0]) > 8 * 2**20


def test_a_word_on_a_boundary_is_decided_by_its_further_bits():
    """The word that holds the boundary between m and m + 1 goes either way, its neighbours do not."""
    std = 1.3 * 2**20
    for m in 0, 1, 12345, 2**21, 5 * 2**20, 9 * 2**20:
        word = int(mpmath.floor(tail_beyond((m + 0.5) / mpmath.mpf(std)) * 2**64)) << 1
        words = np.array([word - 2, word, word + 2], np.uint64)
        low, high = (host_noise.from_words(words, std, more) for more in (NONE, ALL))
        assert (low[1], high[1]) == (m + 1, m) or m > 8 * 2**20  # there a word holds more than two integers
        assert low[1] > high[1]
        assert low[0] >= high[0] > m
        assert high[2] <= low[2] <= m


def test_float64_decides_only_where_it_can():
    """Its error is a thousandth of the slack that is allowed for it."""
    rng = np.random.default_rng(2)
    tails = [int(2.0 ** (64 - e)) for e in rng.uniform(1, 26, 500)] + [
        2**63 - int(2.0**e) for e in rng.uniform(1, 62, 200)
    ]
    for tail in tails:
        p = float(np.uint64(tail) * 2.0**-64 + 2.0**-65)
        exact = mpmath.sqrt(2) * mpmath.erfinv(1 - (2 * mpmath.mpf(tail) + 1) / 2**64)
        assert abs(mpmath.mpf(float(-host_noise.special.ndtri(p))) - exact) < host_noise.SLACK / 1000
    width = 2.0**-64 / scipy.stats.norm.pdf(scipy.stats.norm.isf(host_noise.RARE))
    assert width < host_noise.SLACK / 2


def draws(clients=SECRETS, rounds=(1, 2), attempt=0, steps=3):
    return host_noise.round_draws(clients, rounds, attempt, steps, TREE, [100.0 * (k + 1) for k in range(3)], 5)


def test_a_dispatch_draws_each_clients_noise_and_sampling():
    found = draws()
    assert found["noise"]["a"].shape == (2, 3, 3, 2, 8)
    assert found["sampling"].shape == (2, 3, 3, 5)
    assert found["sampling"].min() >= 0
    assert 2**29 < found["sampling"].max() < 2**sampling.BITS
    for client in range(3):
        std = np.concatenate([x[:, client].reshape(-1) for x in found["noise"].values()]).std()
        assert std == pytest.approx(100 * (client + 1), rel=0.25)


def test_no_two_of_client_round_step_attempt_leaf_and_purpose_share_a_key(monkeypatch):
    keys = []
    monkeypatch.setattr(host_noise, "rounded_normal", lambda key, count, std: keys.append(key) or np.zeros(count, int))
    shake = hashlib.shake_256
    monkeypatch.setattr(host_noise.hashlib, "shake_256", lambda key: keys.append(key) or shake(key))
    for attempt in 0, 1, 11:
        draws(attempt=attempt, rounds=(1, 11, 111))
    assert len(keys) == 3 * 3 * 3 * 3 * 3
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {32}


def test_the_same_secrets_repeat_every_draw_and_others_do_not():
    first, again, other = draws(), draws(), draws(secrets.from_seed(1, 3))
    for x, y, z in zip(*(d["noise"].values() for d in (first, again, other)), strict=True):
        np.testing.assert_array_equal(x, y)
        assert (x == z).mean() < 0.05
    np.testing.assert_array_equal(first["sampling"], again["sampling"])
    late = draws(rounds=(2,))
    np.testing.assert_array_equal(late["noise"]["a"][0], first["noise"]["a"][1])  # however dispatches are cut


def test_the_excess_over_delta_is_its_formula():
    assert host_noise.excess_log2(2**30, 0.0) == pytest.approx(-129)
    assert host_noise.excess_log2(1, 8.0) == pytest.approx(-160 + np.log2(1 + np.exp(8)))


def test_a_dispatch_holds_no_more_noise_than_it_may():
    assert host_noise.most_rounds(5, 1, 2**20, 0) == 51
    assert host_noise.most_rounds(50, 10, 2**30, 10) == 1
