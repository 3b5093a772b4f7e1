"""Schedules are public and fair, those who stay away count for nothing, and uploads that are no numbers are dropped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from dplora_jax.errors import InputError
from dplora_jax.federation import aggregation, compression, participation, robust
from tests.conftest import mostly_slow
from tests.federation import small

pytestmark = pytest.mark.usefixtures("quick_compile")
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
SOME = small.Setup(partial=True, plain=True)
WEIGHTS = np.array(small.SIZES, float)


def moved(setup, joins, **options):
    """The change of the global adapter in one round, and what each client uploaded and showed."""
    arguments = small.arguments(setup, [1], joins=joins, **options)
    before = jax.tree.map(np.array, arguments[0])
    state, (public, _, valid) = small.compiled(setup, 1)(*arguments)
    change = jax.tree.map(lambda x, y: np.array(x) - y, state.adapter, before.adapter)
    return change, jax.tree.map(lambda x: np.array(x)[0, :5], public["uploads"]), np.array(valid)[0, :5], state


def weighted(uploads, weights):
    return jax.tree.map(lambda u: np.tensordot(weights / weights.sum(), u, 1), uploads)


SHAPES = [{}, {"rows": 4, "columns": 2, "wave": 2}, {"wave": 4}]


@pytest.mark.parametrize("shape", mostly_slow(SHAPES[2:], SHAPES), ids=["1x1", "4x2-2", "wave4"])
def test_the_mean_is_over_those_who_take_part_with_their_weights(shape):
    """Whoever stays away shows nothing; waves are filled with those who are there, wherever they sit."""
    everyone = moved(small.Setup(plain=True), None)[1]
    for joins in ([0, 1, 0, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]):
        change, uploads, valid, _ = moved(SOME._replace(**shape), joins)
        there = np.array(joins, bool)
        np.testing.assert_array_equal(valid, there)
        jax.tree.map(close, change, weighted(everyone, WEIGHTS * there))
        jax.tree.map(lambda u, e, t=there: close(u, e * t.reshape(5, *[1] * (e.ndim - 1))), uploads, everyone)


def test_a_round_that_no_one_takes_part_in_leaves_no_trace():
    setup = small.Setup(partial=True)
    before, _, _ = small.run(setup, rounds=[1])
    after, _, _ = small.run(setup, rounds=[2], joins=[0] * 5, state=jax.tree.map(jnp.array, before))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(before.server))


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_an_upload_that_is_not_finite_is_dropped_and_told(value):
    noise = [s * small.CLIP for s in small.NOISES]
    noise[2] = value
    change, uploads, valid, _ = moved(small.Setup(plain=True), None, noise_std=noise)
    assert valid.tolist() == [True, True, False, True, True]
    assert not all(np.isfinite(leaf[2]).all() for leaf in jax.tree.leaves(uploads))
    others = jax.tree.map(lambda u: np.delete(u, 2, 0), uploads)
    jax.tree.map(close, change, weighted(others, np.delete(WEIGHTS, 2)))


def test_a_clients_clip_norm_moves_only_when_its_upload_counts():
    setup = small.Setup(partial=True, plain=True, clipping="adaptive")
    _, _, _, state = moved(setup, [1, 0, 1, 1, 1])
    norms = np.array(state.clip_norms)
    assert norms[1] == np.float32(small.CLIP)
    assert (np.delete(norms, 1) != np.float32(small.CLIP)).all()


@pytest.mark.slow  # the same line as of clip norms
def test_a_clients_own_b_moves_only_when_its_upload_counts():
    _, _, _, state = moved(small.Setup(partial=True, plain=True, method="fedsa"), [1, 0, 1, 1, 1])
    for name, own in state.own.items():
        still = [np.array_equal(own[k], small.adapter()["layers"][name].b) for k in range(5)]
        assert still == [False, True, False, False, False]


@pytest.mark.parametrize(
    ("how", "of"),
    [
        pytest.param("median", np.median, id="median"),
        pytest.param(
            "trimmed",
            lambda x, axis: scipy.stats.trim_mean(x, {5: 0.2, 4: 0.25, 1: 0}[len(x)], axis),
            id="trimmed",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_robust_means_are_the_textbooks_whoever_is_there(how, of):
    setup = SOME._replace(robust=how, rows=2)
    for joins in ([1] * 5, [1, 1, 0, 1, 1], [0, 0, 1, 0, 0]):
        change, uploads, _, _ = moved(setup, joins)
        there = np.flatnonzero(joins)
        jax.tree.map(lambda c, u, t=there: close(c, of(u[t], axis=0)), change, uploads)


def test_one_client_of_garbage_moves_a_median_no_further_than_the_others_reach():
    noise = [s * small.CLIP for s in small.NOISES]
    noise[0] = 1e6
    change, uploads, valid, _ = moved(SOME._replace(robust="median", rows=2), [1] * 5, noise_std=noise)
    assert valid.all()
    assert max(np.abs(u[0]).max() for u in jax.tree.leaves(uploads)) > 1e3
    for c, u in zip(*map(jax.tree.leaves, (change, uploads)), strict=True):
        assert (c >= u[1:].min(0) - 1e-6).all()
        assert (c <= u[1:].max(0) + 1e-6).all()


def test_a_trimmed_mean_cuts_by_the_count_of_those_who_are_there():
    """A fifth of five is one on either side, and of four too: what is begun of a client is a client."""
    uploads = {"x": jnp.array([[0.0], [1.0], [2.0], [3.0], [100.0]])}
    trimmed = robust.trimmed_mean(0.2)
    assert float(trimmed(uploads, jnp.ones(5, bool))["x"][0]) == 2
    assert float(trimmed(uploads, jnp.array([1, 1, 1, 0, 1], bool))["x"][0]) == 1.5
    assert float(trimmed(uploads, jnp.array([0, 1, 0, 0, 1], bool))["x"][0]) == 50.5
    assert float(robust.median(uploads, jnp.array([0, 1, 1, 1, 1], bool))["x"][0]) == 2.5


def test_schedules_are_public_fair_and_of_the_size_asked_for():
    fixed = participation.draw_schedule("fixed:3", 7, 40, 1)
    assert (fixed.sum(1) == 3).all()
    assert np.ptp(fixed.sum(0)) <= 1
    assert len(np.unique(fixed, axis=0)) > 20
    np.testing.assert_array_equal(fixed, participation.draw_schedule("fixed:3", 7, 40, 1))
    assert (fixed != participation.draw_schedule("fixed:3", 7, 40, 2)).any()
    poisson = participation.draw_schedule("poisson:0.3", 50, 400, 1)
    assert abs(poisson.mean() - 0.3) < 6 * np.sqrt(0.21 / poisson.size)  # false alarms: under 1e-8
    assert np.ptp(poisson.sum(1)) > 5
    assert participation.draw_schedule("all", 3, 2, 0).all()


@pytest.mark.parametrize(
    "spec", ["some", "fixed", "fixed:0", "fixed:6", "fixed:x", "poisson:0", "poisson:1.5", "all:2"]
)
def test_a_malformed_participation_is_refused(spec):
    with pytest.raises(InputError, match="participation"):
        participation.check(spec, 5)


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7)])
def test_rounding_is_unbiased_within_a_step_and_on_the_grid(bits, levels):
    """Mean of 2,000 draws within 6 standard errors: false alarms under 1e-6 over 80 numbers."""
    rng = np.random.default_rng(0)
    tree = {"layers": {"q": jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32)}, "head": jnp.ones((4,)) * 0.3}
    keys = jax.random.split(jax.random.key(1), 2000)
    draws = jax.vmap(lambda key: compression.rounded(key, tree, bits))(keys)
    scale = np.abs(np.array(tree["layers"]["q"])).max((1, 2), keepdims=True) / levels
    q = np.array(draws["layers"]["q"])
    np.testing.assert_allclose(q / scale, np.rint(q / scale), atol=1e-3)
    assert (np.abs(q - np.array(tree["layers"]["q"])) <= scale * 1.001).all()
    assert (np.abs(q.mean(0) - np.array(tree["layers"]["q"])) < 6 * scale / 2 / np.sqrt(2000)).all()
    assert q.std(0).max() > 0
    np.testing.assert_allclose(draws["head"], 0.3, rtol=1e-5)  # the largest of a matrix is its scale, and exact


def test_bytes_on_the_way_are_numbers_times_bits_and_a_scale_a_matrix():
    tree = {"layers": {"q": jnp.zeros((2, 3, 5))}, "head": {"bias": jnp.zeros(3)}}
    assert compression.size(tree) == 4 * 33
    assert compression.size(tree, 8) == 2 * (15 + 4) + 3 + 4
    assert compression.size(tree, 4) == 2 * (8 + 4) + 2 + 4


def test_uploads_travel_rounded_and_the_mean_is_of_what_arrived():
    setup = small.Setup(plain=True, upload_bits=4)
    change, uploads, _, _ = moved(setup, None)
    for leaf in jax.tree.leaves(uploads["layers"]):
        flat = leaf.reshape(5, leaf.shape[1], -1)
        steps = flat / np.abs(flat).max(-1, keepdims=True) * 7
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
    jax.tree.map(close, change, weighted(uploads, WEIGHTS))
    full = moved(small.Setup(plain=True), None)[1]
    step = lambda u: np.abs(u.reshape(*u.shape[:2], -1)).max(-1).max() / 7  # noqa: E731
    for got, exact in zip(*(jax.tree.leaves(x["layers"]) for x in (uploads, full)), strict=True):
        assert np.abs(got - exact).max() <= step(exact) * 1.001
        assert np.abs(got - exact).max() > 0


def test_proximal_steps_minimise_the_loss_plus_the_distance_to_the_start():
    """On a constant gradient g, steps of rate r with strength m end at -g / m (1 - (1 - r m)^n) (FedProx, equation 2)."""
    optimizer = optax.chain(aggregation.proximal(0.5), optax.sgd(0.4))
    params = start = {"w": jnp.array([1.0, -2.0])}
    grad, state = {"w": jnp.array([3.0, 1.0])}, optimizer.init(start)
    for _ in range(3):
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"] - start["w"], -grad["w"] / 0.5 * (1 - 0.8**3), rtol=1e-5)
