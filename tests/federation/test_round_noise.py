"""The noise on the uploads of the compiled program: its size, and that no two draws are related.

Secrets are fixed, so a passing test always passes; the false-alarm rates are over another choice of secrets.
"""

import jax
import numpy as np
import pytest
import scipy.stats

from dplora_jax.privacy import noise, secrets
from tests.federation import small

ATTEMPTS = 8
STD = np.array(small.NOISES) * small.CLIP / small.DIVISORS  # of each client's noisy mean gradient


def by_client(tree):
    """Leaves [R, K, ...] as {name: [K, everything else]}."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.moveaxis(x, 1, 0).reshape(x.shape[1], -1) for path, x in leaves}


def chi_square_bounds(count, alarm):
    """The range of a sample's std over its true one, left with probability `alarm`."""
    low, high = scipy.stats.chi2.ppf([alarm / 2, 1 - alarm / 2], count)
    return np.sqrt(low / count), np.sqrt(high / count)


def check_std(tree, std, alarm):
    """Each leaf and client of `tree` [R, K, ...] has mean 0 and deviation `std` [K], or `std(leaf's name)` [K]."""
    for name, values in by_client(tree).items():
        low, high = chi_square_bounds(values.shape[1], alarm)
        expected = std(name) if callable(std) else std
        ratio = np.sqrt((values.astype(float) ** 2).mean(1)) / expected
        assert ((low < ratio) & (ratio < high)).all(), (name, ratio, low, high)
        assert (np.abs(values.mean(1)) < 5 * expected / np.sqrt(values.shape[1])).all(), name


@pytest.fixture(scope="module")
def silent():
    """Dispatches of several attempts in which nobody joins: what they show is noise alone."""
    shown = [small.run(attempt=attempt, join_below=0)[1:] for attempt in range(ATTEMPTS)]
    assert all((private["sampled"] == 0).all() for _, private in shown)
    return [public for public, _ in shown]


def test_an_upload_carries_noise_of_std_sigma_times_clip_over_the_expected_batch(silent):
    """Times its part's learning rate and the root of its steps; per leaf and client; false alarms: 25 x 1e-6."""
    uploads = jax.tree.map(lambda *x: np.concatenate(x), *[public["uploads"] for public in silent])
    rate = lambda name: small.RATES["head" if "head" in name else "layers"]  # noqa: E731
    check_std(uploads, lambda name: rate(name) * np.sqrt(small.Setup().local_steps) * STD, 1e-6)


def test_each_step_is_noised_in_full(silent):
    """Per leaf, client and step; false alarms: 50 x 1e-6."""
    released = jax.tree.map(lambda *x: np.concatenate(x), *[public["released"] for public in silent])
    for step in range(small.Setup().local_steps):
        check_std(jax.tree.map(lambda x, step=step: x[:, :, step], released), STD, 1e-6)


def test_no_two_leaves_clients_steps_rounds_or_attempts_share_noise(silent):
    """All pairs of 960 vectors of 48 draws, the leaves' first (a threefry draw of one shape begins a longer one's).

    False alarms: under 1e-4 (of 460,000 pairs, |r| > 0.8 has p = 1e-11 each); shared noise has r = 1.
    """
    vectors = []
    for public in silent:
        for leaf in jax.tree.leaves(public["released"]):
            flat = leaf.reshape(*leaf.shape[:3], -1)
            if flat.shape[-1] >= 48:
                vectors.extend(flat[..., :48].reshape(-1, 48))
    assert len(vectors) == ATTEMPTS * 5 * len(small.ROUNDS) * len(small.SIZES) * small.Setup().local_steps
    correlation = np.corrcoef(vectors)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 0.8


def test_sums_over_clients_steps_or_rounds_lose_no_noise(silent):
    """Variances add up: what is slightly correlated everywhere would show here. False alarms: 3 x 5 x 1e-6."""
    released = jax.tree.map(lambda *x: np.concatenate(x), *[public["released"] for public in silent])
    scaled = jax.tree.map(lambda x: x / STD.reshape(1, -1, *[1] * (x.ndim - 2)), released)
    for axis in 0, 1, 2:
        for name, leaf in ((jax.tree_util.keystr(p), x) for p, x in jax.tree.leaves_with_path(scaled)):
            total = leaf.sum(axis) / np.sqrt(leaf.shape[axis])
            low, high = chi_square_bounds(total.size, 1e-6)
            assert low < np.sqrt((total**2).mean()) < high, (axis, name)


def test_the_same_keys_repeat_the_noise_bit_by_bit_and_another_attempt_does_not(silent):
    again = small.run(attempt=3, join_below=0)[1]
    jax.tree.map(np.testing.assert_array_equal, again, silent[3])
    jax.tree.map(lambda x, y: pytest.fail("shared") if (x == y).mean() > 0.01 else None, silent[3], silent[4])


@pytest.mark.slow  # that of `test_round_meshes` is in uploads of real gradients
def test_noise_is_the_same_on_one_device_and_on_eight(silent):
    wide = small.run(small.Setup(rows=8), attempt=2, join_below=0)[1]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), wide, silent[2])


def test_noise_is_added_to_the_sum_of_real_gradients_and_divided_by_the_expected_batch():
    """Round 1, step 1, with and without noise: the difference is `noise.gaussian` under the same keys, of its std."""
    differences = []
    for attempt in range(3):
        noisy, bare = (small.run(attempt=attempt, **fields)[1] for fields in ({}, {"noise_std": 0}))
        first = jax.tree.map(lambda x, y: x[:1, :, 0] - y[:1, :, 0], noisy["released"], bare["released"])
        differences.append(first)
        assert all(np.abs(leaf[0, :, 0]).max() > 0 for leaf in jax.tree.leaves(bare["released"]))
        keys = secrets.round_keys(small.SECRETS, [1], attempt)["noise"][0]
        for client in range(len(small.SIZES)):
            drawn = jax.jit(noise.gaussian)(keys[client], small.adapter(), STD[client], 0)
            jax.tree.map(lambda x, y, k=client: np.testing.assert_allclose(x[0, k], y, atol=2e-5), first, drawn)
    pooled = jax.tree.map(lambda *x: np.concatenate(x), *differences)
    check_std(pooled, STD, 1e-6)


def test_noise_follows_the_normal_distribution(silent):
    """Kolmogorov and Smirnov's test of all draws together; false alarms: 1e-4."""
    released = jax.tree.map(lambda *x: np.concatenate(x), *[public["released"] for public in silent])
    draws = np.concatenate([(values / STD[:, None]).reshape(-1) for values in by_client(released).values()])
    assert len(draws) > 70_000
    assert scipy.stats.kstest(draws, "norm").pvalue > 1e-4
