"""Poisson sampling of fixed capacity. Keys are fixed; the stated false-alarm rates are over another choice of keys."""

import fractions
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import strategies

from dplora_jax.privacy import sampling, secrets

SECRETS = secrets.from_seed(7, 5)

DRAWS = 20_000
KEYS = jax.random.split(jax.random.key(11), DRAWS)

# Sizes, rates and a client's own capacity are traced, as in the compiled round, where they are data.
draw = jax.jit(jax.vmap(sampling.poisson, (0, None, None, None, None, None)), static_argnums=(4, 5))


def inclusion(size, rate, own_capacity, records, capacity, keys=KEYS):
    """Which records each draw kept, bool [draws, records], after checking what holds in every single draw."""
    indices, weights = jax.device_get(draw(keys, size, sampling.threshold(rate), own_capacity, records, capacity))
    assert indices.shape == weights.shape == (len(keys), capacity)
    assert set(np.unique(weights)) <= {0.0, 1.0}
    counts = np.zeros((len(keys), records), int)
    np.add.at(counts, (np.arange(len(keys))[:, None], indices), weights.astype(int))
    assert counts.max(initial=0) <= 1, "a record was taken twice"
    assert not counts[:, size:].any(), "a row beyond the client's own records was taken"
    assert weights.sum(1).max() <= own_capacity
    assert not weights[:, own_capacity:].any()
    return counts.astype(bool)


def test_every_one_of_several_keys_decides_who_joins():
    keys = KEYS[:4]
    kept = [np.asarray(sampling.poisson(keys.at[i].set(KEYS[9]), 64, 1 << 29, 64, 64, 64)[0]) for i in range(4)]
    kept.append(np.asarray(sampling.poisson(keys, 64, 1 << 29, 64, 64, 64)[0]))
    assert len({tuple(order) for order in kept}) == 5


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_each_record_joins_with_probability_q_on_its_own(rate):
    """Frequencies and pairwise covariances; false alarms: under 1e-4 (5 standard errors, 55 bounds)."""
    kept = inclusion(10, rate, 10, 12, 10)[:, :10]
    variance = rate * (1 - rate)
    assert np.abs(kept.mean(0) - rate).max() < 5 * np.sqrt(variance / DRAWS)
    covariance = np.cov(kept.T, bias=True)
    off_diagonal = covariance[~np.eye(10, dtype=bool)]
    assert np.abs(off_diagonal).max() < 5 * variance / np.sqrt(DRAWS)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_sample_size_is_binomial_and_not_fixed(rate):
    """Chi-square against Binomial(10, q); false alarms: 1e-5 each."""
    sizes = inclusion(10, rate, 10, 12, 10).sum(1)
    expected = DRAWS * scipy.stats.binom.pmf(np.arange(11), 10, rate)
    common = expected >= 5
    observed = np.bincount(sizes, minlength=11)
    pairs = [(observed[common], expected[common]), ([observed[~common].sum()], [expected[~common].sum()])]
    statistic = sum(((np.asarray(o) - e) ** 2 / np.maximum(e, 1)).sum() for o, e in pairs)
    assert scipy.stats.chi2.sf(statistic, common.sum()) > 1e-5
    assert np.var(sizes) > 0.9 * 10 * rate * (1 - rate)


@pytest.mark.parametrize(("rate", "own_capacity"), [(1.0, 4), (0.7, 3)])
def test_beyond_capacity_every_subset_is_equally_likely(rate, own_capacity):
    """Records and pairs; false alarms: under 1e-4 (5 standard errors, 55 bounds)."""
    kept = inclusion(10, rate, own_capacity, 12, 10)[:, :10]
    full = kept[kept.sum(1) == own_capacity]
    assert len(full) > 0.9 * DRAWS
    one, two = own_capacity / 10, own_capacity * (own_capacity - 1) / 90
    assert np.abs(full.mean(0) - one).max() < 5 * np.sqrt(one * (1 - one) / len(full))
    together = (full.T.astype(int) @ full.astype(int)) / len(full)
    pairs = together[~np.eye(10, dtype=bool)]
    assert np.abs(pairs - two).max() < 5 * np.sqrt(two * (1 - two) / len(full))


def test_capacity_cuts_a_sample_and_takes_no_others():
    """The kept records of a small capacity are among those that the full capacity keeps, under the same key."""
    everyone, few = inclusion(10, 0.5, 10, 12, 10), inclusion(10, 0.5, 3, 12, 10)
    assert not (few & ~everyone).any()
    assert (few.sum(1) == np.minimum(everyone.sum(1), 3)).all()


def test_rate_one_takes_all_and_rate_zero_takes_nobody():
    assert inclusion(10, 1.0, 10, 12, 10)[:, :10].all()
    assert not inclusion(10, 0.0, 10, 12, 10).any()
    assert not inclusion(0, 1.0, 5, 12, 10, KEYS).any()


def test_rows_of_weight_zero_point_at_a_row_that_exists():
    indices, weights = draw(KEYS, 3, sampling.threshold(1.0), 3, 12, 10)
    assert (weights.sum(1) == 3).all()
    assert (indices[weights == 0] == 0).all()


@hypothesis.given(strategies.floats(0, 1))
@hypothesis.settings(derandomize=True, deadline=None)
def test_threshold_never_exceeds_the_accounted_rate(rate):
    exact = fractions.Fraction(rate) * 2**sampling.BITS
    assert exact - 1 < sampling.threshold(rate) <= exact


def test_threshold_is_exact_at_zero_and_one():
    assert sampling.threshold(1.0) == 2**30
    assert sampling.threshold(0.5) == 2**29
    assert sampling.threshold(0.0) == 0


@functools.cache
def drawn(counts, most, draws=4000):
    """`sampling.subsets` of units of `counts` rows in so many steps -> (places, brought)."""
    keys = secrets.keys_of(SECRETS[:1], "rows", [1], 0)[0, 0]
    one = lambda step: sampling.subsets(keys, step, jnp.array(counts), most)  # noqa: E731
    return jax.device_get(jax.vmap(one)(jnp.arange(draws)))


def test_a_unit_brings_all_of_its_rows_or_a_uniform_subset_of_them():
    """Chi-square over the ten subsets of three of five rows, wrong once in 10^4."""
    places, brought = drawn((1, 3, 5), 3)
    assert (brought.sum(-1) == [1, 3, 3]).all()
    assert (np.sort(places[:, 1]) == [0, 1, 2]).all()
    assert (places[:, 0] == 0).all()
    subsets, counts = np.unique(np.sort(places[:, 2]), axis=0, return_counts=True)
    assert len(subsets) == 10
    assert (np.diff(subsets) > 0).all()
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_no_two_steps_rounds_attempts_or_clients_draw_the_same_rows():
    keys = np.concatenate([secrets.keys_of(SECRETS, "rows", [1, 2], attempt).reshape(-1, 4, 2) for attempt in (0, 1)])
    steps = jax.vmap(lambda keys: jax.vmap(lambda t: sampling.subsets(keys, t, jnp.array([1000]), 8)[0])(jnp.arange(2)))
    rows = np.array(steps(keys)).reshape(-1, 8)
    assert len(np.unique(rows, axis=0)) == len(rows)
