"""Hardened noise in the compiled program: its uploads are integers on the grid, and the host's noise is in each of them."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from dplora_jax.federation import compression, mesh, round
from dplora_jax.privacy import clipping, host_noise, integers, sampling
from dplora_jax.privacy.adaptive import Adaptive
from dplora_jax.privacy.hardened import Hardened
from dplora_jax.privacy.unclipped import Unclipped
from tests.federation import small
from tests.federation.test_round import row_gradient
from tests.federation.test_round_noise import check_std, chi_square_bounds

BITS = integers.bits_for([[m] for m in small.MECHANISMS])
STDS = [sigma * 2.0**BITS for sigma in small.NOISES]
UNIT = small.CLIP * 2.0**-BITS
PLAIN, WIDE = small.Setup(), small.Setup(rows=4, wave=2, microbatch=3)


@functools.cache
def compiled(setup):
    plain = small.federation(setup)
    rounds = dataclasses.replace(plain, local=dataclasses.replace(plain.local, noise=Hardened(small.CLIP, BITS)))
    program = round.make(rounds, small.grid_of(setup), True, True)
    return program.lower(*arguments(setup, draws())).compile(compiler_options={"xla_backend_optimization_level": 0})


def arguments(setup, drawn, **fields):
    state, params, clients, data, _ = small.arguments(setup, small.ROUNDS, **fields)
    return state, params, clients, data, mesh.place_keys(small.grid_of(setup), drawn, len(clients.size))


def draws(attempt=0):
    steps = small.Setup().local_steps
    return host_noise.round_draws(small.SECRETS, small.ROUNDS, attempt, steps, small.adapter(), STDS, max(small.SIZES))


def run(setup=PLAIN, noise=True, **fields):
    """(state, uploads and noisy gradients, diagnostics) of three rounds, as numpy arrays of the five real clients."""
    drawn = draws()
    if not noise:
        drawn["noise"] = jax.tree.map(np.zeros_like, drawn["noise"])
    state, shown = compiled(setup)(*arguments(setup, drawn, **fields))
    public, private, _ = jax.tree.map(lambda x: np.array(x)[:, : len(small.SIZES)], shown)
    return jax.tree.map(np.array, state), public, private


def integers_of(released):
    """The integer sums of [R, K, steps, ...] gradients; they must be integers to the last bits of a float32."""

    def leaf(x):
        scaled = x.astype(float) * small.DIVISORS.reshape(1, -1, *[1] * (x.ndim - 2)) / UNIT
        whole = np.rint(scaled)
        np.testing.assert_allclose(scaled, whole, rtol=4e-7, atol=1e-3)
        return whole.astype(int)

    return jax.tree.map(leaf, released)


def first(tree):
    """Round 1, step 1, before any noise has moved the parameters."""
    return jax.tree.map(lambda x: x[0, :, 0], tree)


@pytest.fixture(scope="module")
def bare():
    return run(noise=False)


def naive_sum(client):
    """The clipped gradients of those whom the host's draws let join round 1's first step, in units of the grid."""
    mechanism, draws_of = small.MECHANISMS[client], draws()["sampling"][0, client, 0]
    below = sampling.threshold(mechanism.sampling_rate)
    order = np.argsort(draws_of[: mechanism.records], kind="stable")[: mechanism.capacity]
    total = jax.tree.map(np.zeros_like, small.adapter())
    joined = [row for row in order if draws_of[row] < below]
    for row in joined:
        record = {name: array[row : row + 1] for name, array in small.records()[client].items()}
        grad = row_gradient()(small.adapter(), record)
        factor = min(1, small.CLIP / float(optax.tree.norm(grad))) / UNIT
        total = jax.tree.map(lambda t, g, f=factor: t + f * np.asarray(g), total, grad)
    return total, len(joined)


def test_a_noise_free_gradient_is_an_integer_on_the_grid_and_close_to_a_naive_clipped_sum(bare):
    whole = first(integers_of(bare[1]["released"]))
    for client in range(len(small.SIZES)):
        total, count = naive_sum(client)
        assert bare[2]["sampled"][0, client, 0] == count
        jax.tree.map(
            lambda x, y, k=client: np.testing.assert_allclose(x[k], y, atol=2**BITS * 3e-3, rtol=0), whole, total
        )
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole)) > 2**BITS / 10


def test_who_joins_a_step_follows_from_that_steps_draws_of_the_host(bare):
    below = np.array([sampling.threshold(m.sampling_rate) for m in small.MECHANISMS])
    inside = np.arange(max(small.SIZES)) < np.array(small.SIZES)[:, None]
    joined = ((draws()["sampling"] < below[:, None, None]) & inside[:, None]).sum(-1)
    np.testing.assert_array_equal(bare[2]["sampled"], np.minimum(joined, np.array(small.CAPACITIES)[:, None]))
    assert len(np.unique(joined[:, 2])) > 2


def test_the_hosts_noise_is_what_the_gradients_hold_to_the_bit(bare):
    noisy = first(integers_of(run()[1]["released"]))
    drawn = jax.tree.map(lambda x: x[0, :, 0], draws()["noise"])

    def check(x, y, z):  # float32 holds 24 bits of a sum
        np.testing.assert_allclose(x - y, z, atol=np.abs(x).max() * 2**-23)

    jax.tree.map(check, noisy, first(integers_of(bare[1]["released"])), drawn)


def test_uploads_carry_noise_of_std_sigma_times_clip_over_the_expected_batch():
    """Nobody joins; per leaf and client; false alarms: 25 x 1e-6, and for each step and round 1e-6 over all."""
    _, public, private = run(join_below=0)
    assert (private["sampled"] == 0).all()
    std = np.array(small.NOISES) * small.CLIP / small.DIVISORS
    rate = lambda name: small.RATES["head" if "head" in name else "layers"]  # noqa: E731
    check_std(public["uploads"], lambda name: rate(name) * np.sqrt(small.Setup().local_steps) * std, 1e-6)
    scaled = [x / std.reshape(1, -1, *[1] * (x.ndim - 2)) for x in jax.tree.leaves(public["released"])]
    for number in range(len(small.ROUNDS)):
        for step in range(small.Setup().local_steps):
            drawn = np.concatenate([x[number, :, step].reshape(-1) for x in scaled])
            low, high = chi_square_bounds(drawn.size, 1e-6)
            assert low < np.sqrt((drawn**2).mean()) < high


@pytest.mark.slow
def test_meshes_waves_and_microbatches_change_nothing(bare):
    """Beyond a step or two of the grid, where a row's float gradient falls on the other side of one."""
    wide = run(WIDE, noise=False)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), wide, bare)


def test_a_record_moves_an_integer_sum_by_at_most_the_clipping_norm():
    """Client 1 takes all its records: each in turn becomes the null record."""
    loud = [dict(r, scale=np.full_like(r["scale"], 1e4)) for r in small.records()]
    reference = first(integers_of(run(data=loud, noise=False)[1]["released"]))
    for record in range(small.SIZES[1]):
        data = [{name: array.copy() for name, array in shard.items()} for shard in loud]
        data[1]["scale"][record] = 0
        other = first(integers_of(run(data=data, noise=False)[1]["released"]))
        change = jax.tree.map(lambda x, y: x - y, other, reference)
        moved = [sum(int((leaf[k].astype(object) ** 2).sum()) for leaf in jax.tree.leaves(change)) for k in range(5)]
        assert (0.999 * 2**BITS) ** 2 < moved[1] <= 4**BITS
        assert moved[0] == moved[2] == moved[3] == moved[4] == 0


def test_a_record_without_a_finite_gradient_counts_as_the_null_record():
    sums = []
    for value in np.inf, 0:
        data = small.records()
        data[1]["scale"][2] = value
        sums.append(first(run(data=data, noise=False)[1]["released"]))
    jax.tree.map(np.testing.assert_array_equal, *sums)


def test_the_server_averages_what_was_released():
    """Round 1's uploads are the parts' learning rates times the released gradients, as with other noise."""
    _, public, _ = run()
    for part, rate in small.RATES.items():
        expected = jax.tree.map(lambda g, rate=rate: -rate * g.sum(2), public["released"][part])
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), public["uploads"][part], expected
        )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"clipper": Adaptive(small.CLIP)}, "has one scale"),
        ({"clipper": clipping.Clip(2 * small.CLIP)}, "units of the clip norm"),
        ({"clipper": Unclipped()}, "hides only what is clipped"),
        ({"upload": compression.Rounded(8)}, "rounded by device keys"),
    ],
)
def test_combinations_without_a_meaning_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(small.federation(PLAIN).local, noise=Hardened(small.CLIP, BITS), **fields)


def test_optimizers_see_floats():
    assert {leaf.dtype for leaf in jax.tree.leaves(run()[1])} == {np.dtype("float32")}
    assert optax.tree.norm(run()[0].adapter) > 0


def test_halves_that_are_trained_in_turn_take_their_own_part_of_the_hosts_noise():
    """RoLoRA: where nobody joins, the trained half holds exactly its draws, and the other nothing."""
    _, public, _ = run(small.Setup(method="rolora", plain=True), join_below=0)
    sums, drawn = integers_of(public["released"]), draws()["noise"]
    for name, pair in sums["layers"].items():
        for number, (trained, other) in enumerate(("ba", "ab", "ba")):
            expected = getattr(drawn["layers"][name], trained)[number]
            np.testing.assert_array_equal(getattr(pair, trained)[number], expected)
            assert (getattr(pair, other)[number] == 0).all()
