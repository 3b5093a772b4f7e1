"""Adaptive clipping in the compiled round: each client's clip norm follows from what it released, its noise follows the norm."""

import functools

import jax
import numpy as np
import pytest

from dplora_jax.privacy import adaptive, noise, secrets
from tests.federation import small

pytestmark = pytest.mark.usefixtures("quick_compile")
SETUP = small.Setup(clipping="adaptive")
QUANTILE, RATE, COUNT_STD = 0.5, 0.2, 0.9
STEPS = SETUP.local_steps
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def clip_norms_of(counts):
    """The clip norm of each step, and after the last, from the released counts [R, K, S] alone -> [R * S + 1, K]."""
    norms = [np.full(len(small.SIZES), small.CLIP)]
    for count in np.moveaxis(counts, 1, 2).reshape(-1, len(small.SIZES)):
        norms.append(norms[-1] * np.exp(-RATE * (count / small.DIVISORS + 0.5 - QUANTILE)))
    return np.array(norms)


@pytest.fixture(scope="module")
def shown():
    """The final state and public transcript of: real data with noise, and nobody joining."""
    return {name: small.run(SETUP, count_std=COUNT_STD, **fields)[:2] for name, fields in
            (("real", {}), ("silent", {"join_below": 0}))}  # fmt: skip


@pytest.mark.parametrize("name", ["real", "silent"])
def test_clip_norms_follow_from_the_released_counts_alone(shown, name):
    state, public = shown[name]
    norms = clip_norms_of(public["count"])
    close(state.clip_norms, norms[-1])
    assert len(np.unique(state.clip_norms)) == len(small.SIZES)


def test_noise_is_scaled_by_the_current_clip_norm_and_the_counts_is_not(shown):
    """Every draw is recomputed from the clients' keys: the gradients' leaves first, then the count as one leaf more."""
    _, public = shown["silent"]
    norms = clip_norms_of(public["count"])
    assert np.abs(norms[1:-1] / small.CLIP - 1).mean() > 0.03
    draw = jax.jit(lambda keys, step: noise.gaussian(keys, (small.adapter(), np.float32(0)), 1.0, step))
    for index, number in enumerate(small.ROUNDS):
        keys = secrets.round_keys(small.SECRETS, [number], 0)["noise"][0]
        for client, sigma in enumerate(small.NOISES):
            for step in range(STEPS):
                drawn, of_count = draw(keys[client], step)
                close(public["count"][index, client, step], COUNT_STD * of_count)
                std = sigma * norms[index * STEPS + step, client] / small.DIVISORS[client]
                got = jax.tree.map(lambda x, at=(index, client, step): x[at], public["released"])
                jax.tree.map(lambda x, y, std=std: close(x, std * y), got, drawn)


def test_each_step_clips_at_its_own_norm_and_counts_against_it():
    """Client 1 takes all its four records in each step: three without a gradient, and a large one that is cut to the norm."""
    data = small.records()
    data[1]["scale"] = np.array([0, 1e4, 0, 0], np.float32)
    _, public, private = small.run(SETUP, data=data, noise_std=0, count_std=0)
    norms = clip_norms_of(public["count"])
    close(public["count"][:, 1], 1.0)  # 3 halves less one
    close(norms[:, 1], small.CLIP * np.exp(-RATE * (0.75 - QUANTILE) * np.arange(len(norms))))
    leaves = [leaf[:, 1].reshape(len(norms) - 1, -1).astype(float) for leaf in jax.tree.leaves(public["released"])]
    close(np.sqrt(sum((leaf**2).sum(1) for leaf in leaves)), norms[:-1, 1] / small.DIVISORS[1])
    joined = private["sampled"] > 0
    share = np.where(joined, public["count"] / np.maximum(private["sampled"], 1) + 0.5, 0)
    close(share + private["clip_fraction"], joined.astype(float))


@pytest.mark.parametrize("client", [1, 3])
def test_a_record_moves_gradient_and_count_by_at_most_the_clip_norm_and_a_half(client):
    """Each record in turn, large enough to be clipped, becomes one that is not finite and so adds nothing to either sum."""
    loud = [dict(r, scale=np.full_like(r["scale"], 1e4)) for r in small.records()]
    reference = small.run(SETUP, data=loud, noise_std=0, count_std=0)[1]
    bound, moved = small.CLIP / small.DIVISORS[client], 0
    for record in range(small.SIZES[client]):
        data = [{name: array.copy() for name, array in shard.items()} for shard in loud]
        data[client]["scale"][record] = np.inf
        public = small.run(SETUP, data=data, noise_std=0, count_std=0)[1]
        change = jax.tree.map(lambda x, y: (x - y)[0, client, 0].astype(float).ravel(), public, reference)
        of_grad = np.sqrt(sum(leaf @ leaf for leaf in jax.tree.leaves(change["released"])))
        of_count = change["count"][0]
        assert (of_count, of_grad) == pytest.approx((0.5, bound), rel=1e-4) or (of_count == 0 and of_grad < 1e-7)
        moved += of_count > 0
    assert moved > 0


@pytest.mark.slow
def test_the_mesh_changes_nothing_and_a_run_goes_on_on_another(shown):
    """Clip norms live in the state, of real clients alone."""
    wide = small.run(SETUP._replace(rows=8), count_std=COUNT_STD)[0]
    assert wide.clip_norms.shape == (len(small.SIZES),)
    jax.tree.map(close, wide, shown["real"][0])
    on = small.run(SETUP, range(4, 7), state=wide, count_std=COUNT_STD)[1]
    jax.tree.map(close, on, small.run(SETUP, range(4, 7), state=shown["real"][0], count_std=COUNT_STD)[1])


def test_the_norm_settles_at_the_quantile():
    norms = np.random.default_rng(0).lognormal(2, 1, 400).astype(np.float32)
    for quantile in 0.3, 0.8:
        clip_norm = 1.0
        for _ in range(200):
            count = adaptive.centred_count(norms, clip_norm, np.ones(400, np.float32))
            clip_norm = adaptive.next_norm(clip_norm, count, 400.0, quantile, 0.2)
        assert (norms <= clip_norm).mean() == pytest.approx(quantile, abs=0.01)


def test_no_count_drives_a_clip_norm_out_of_float32s_reach():
    for count, end in ((-1e9, 1e6), (1e9, 1e-6), (np.inf, 1e-6), (np.nan, 2.0)):
        assert adaptive.next_norm(np.float32(2.0), np.float32(count), 4.0, 0.5, 5.0) == np.float32(end)
