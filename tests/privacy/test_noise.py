"""The noise is N(0, std^2), on every coordinate its own. All keys are fixed, so that a passing test always passes; the
false-alarm rates say how rarely another choice of keys would fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dplora_jax.privacy import banded, noise, secrets

STD = 0.7
TREE = {"a": jnp.zeros(128), "b": jnp.zeros(128), "c": jnp.zeros((2, 16, 4)), "small": jnp.zeros(3)}
draw = jax.jit(lambda keys, std, step: noise.gaussian(keys, TREE, std, step))


def keys_of(client=0, round_number=1, attempt=0):
    return secrets.round_keys(secrets.from_seed(0, 3), [round_number], attempt)["noise"][0, client]


@pytest.fixture(scope="module")
def steps():
    """Draws of 2,000 steps: {leaf: [2000, ...]}."""
    every = jax.jit(jax.vmap(lambda step: noise.gaussian(keys_of(), TREE, STD, step)))
    return jax.device_get(every(np.arange(2000)))


@pytest.mark.parametrize("leaf", TREE)
def test_noise_has_mean_zero_std_and_the_fourth_moment_of_a_normal(steps, leaf):
    """False alarms: under 2e-6 a leaf (5 standard errors each)."""
    x = steps[leaf].reshape(-1) / STD
    assert x.dtype == np.float32
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x.astype(float) ** power).mean() - moment) < 5 * np.sqrt(spread / x.size), power


@pytest.mark.parametrize("leaf", TREE)
def test_noise_follows_the_normal_distribution(steps, leaf):
    """Kolmogorov and Smirnov's test; false alarms: 1e-4 a leaf. It would see a std that is off by 3 %."""
    x = steps[leaf].reshape(-1)
    assert scipy.stats.kstest(x / STD, "norm").pvalue > 1e-4
    if x.size > 100_000:
        assert scipy.stats.kstest(1.03 * x / STD, "norm").pvalue < 1e-4


def test_noise_is_proportional_to_std():
    one, three = (draw(keys_of(), std, 5) for std in (1.0, 3.0))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(3 * x, y, rtol=1e-6), one, three)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(draw(keys_of(), 0.0, 5)))


def test_a_draw_is_half_the_sum_of_four_normals_and_every_key_counts():
    """With all 256 bits of the digest in use, changing any word of any key changes every leaf."""
    keys = keys_of()
    drawn = draw(keys, 1.0, 3)
    for index, name in (1, "b"), (3, "small"):
        parts = [
            jax.random.normal(
                jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(k), 3), index), TREE[name].shape
            )
            for k in keys
        ]
        np.testing.assert_allclose(drawn[name], sum(parts) / 2, atol=1e-6)
    for word in range(8):
        changed = keys.copy()
        changed.reshape(-1)[word] ^= 1 << 17
        other = draw(changed, 1.0, 3)
        assert all((drawn[name] != other[name]).mean() > 0.9 for name in TREE), word


def test_noise_reaches_past_the_largest_float32_normal(monkeypatch):
    """JAX's float32 normal ends at 5.42; at that end of all four normals a draw is twice as far out."""
    largest = float(np.sqrt(2) * jax.lax.erf_inv(np.nextafter(np.float32(1), np.float32(0))))
    assert 5.2 < largest < 5.43
    monkeypatch.setattr(noise.threefry, "normal", lambda key, shape: jnp.full(shape, largest))
    drawn = noise.gaussian(keys_of(), TREE, 1.0, 0)
    assert all((leaf > 10.4).all() for leaf in jax.tree.leaves(drawn))


def test_no_two_leaves_steps_clients_rounds_or_attempts_share_noise():
    """Every pair of 432 vectors of 128 draws is uncorrelated; false alarms: under 1e-6 (|r| > 0.6)."""
    vectors = [
        np.ravel(drawn[leaf])
        for client in range(3) for round_number in (1, 2, 3, 11) for attempt in range(3) for step in range(4)
        for drawn in [draw(keys_of(client, round_number, attempt), STD, step)] for leaf in ("a", "b", "c")
    ]  # fmt: skip
    correlation = np.corrcoef(vectors) - np.eye(len(vectors))
    assert len(vectors) == 432
    assert np.abs(correlation).max() < 0.6


def test_coordinates_of_one_leaf_are_uncorrelated(steps):
    """Over 2,000 steps, 128 x 127 / 2 pairs; false alarms: under 1e-4 (|r| > 0.15 is 6.7 standard errors)."""
    for leaf in ("a", "b", "c"):
        correlation = np.corrcoef(steps[leaf].reshape(2000, -1).T) - np.eye(128)
        assert np.abs(correlation).max() < 0.15


def test_small_leaf_is_no_prefix_of_a_large_one(steps):
    assert not any(
        np.isclose(steps["small"], steps[leaf].reshape(2000, -1)[:, :3]).all(1).any() for leaf in ("a", "b", "c")
    )


def test_add_adds_in_float32():
    tree = {"x": jnp.array([256.0], jnp.bfloat16)}
    total = noise.add(tree, {"x": jnp.array([0.25], jnp.float32)})
    assert total["x"].dtype == jnp.float32
    assert total["x"][0] == 256.25


@pytest.mark.parametrize(("steps", "bands"), [(4, 4), (6, 2), (9, 3), (24, 8), (25, 5)])
def test_undone_correlation_leaves_a_record_no_more_than_its_turns_are_charged_as(steps, bands):
    """C, of what is really added: a record's steps, one in `bands`, meet in no row of it, and each comes to norm 1."""
    made = banded.streaming_matrix(steps, bands)

    def step(memory, draw):
        drawn, memory = made.multiply_next(draw, memory)
        return memory, drawn

    inverse = jax.jit(lambda draws: jax.lax.scan(step, made.init_multiply(draws[0]), draws)[1])(jnp.eye(steps))
    c = np.linalg.inv(np.asarray(inverse, float))
    np.testing.assert_allclose(np.linalg.norm(c, axis=0), 1, rtol=1e-6)
    rows, columns = np.indices(c.shape)
    np.testing.assert_allclose(c[(rows < columns) | (rows >= columns + bands)], 0, atol=1e-6)
