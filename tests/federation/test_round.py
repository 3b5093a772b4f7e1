"""The compiled round does what a naive federation in a Python loop does, and its uploads hold no more than they may."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from dplora_jax.privacy import sampling, secrets
from dplora_jax.privacy.noise import NoNoise
from dplora_jax.privacy.unclipped import Unclipped
from tests.federation import small

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


@functools.cache
def row_gradient():
    model, params = small.model_and_params()
    loss = small.loss(model, params)
    return jax.jit(jax.grad(lambda adapter, row: loss(adapter, row)[0]))


def naive_upload(client, adapter, keys, data):
    """One client's noise-free local steps, a record at a time, in numpy -> (upload, sampled counts, clip fractions)."""
    mechanism, start, counts, fractions = small.MECHANISMS[client], adapter, [], []
    for step in range(small.Setup().local_steps):
        own = jax.random.wrap_key_data(keys["sampling"][client], impl="threefry2x32")
        four = jax.vmap(lambda key, step=step: jax.random.fold_in(key, step))(own)
        size, below = mechanism.records, sampling.threshold(mechanism.sampling_rate)
        rows, weights = sampling.poisson(four, size, below, mechanism.capacity, max(small.SIZES), max(small.CAPACITIES))
        total, clipped = jax.tree.map(np.zeros_like, adapter), 0
        for row in np.asarray(rows)[np.asarray(weights) == 1]:
            grad = row_gradient()(adapter, {name: array[row : row + 1] for name, array in data[client].items()})
            norm = float(optax.tree.norm(grad))
            clipped += norm > small.CLIP
            total = jax.tree.map(lambda t, g, n=norm: t + np.asarray(g) * min(1, small.CLIP / n), total, grad)
        mean = jax.tree.map(lambda t: t / (mechanism.sampling_rate * mechanism.records), total)
        adapter = {
            part: jax.tree.map(lambda a, g, p=part: a - small.RATES[p] * g, adapter[part], mean[part])
            for part in adapter
        }
        counts.append(weights.sum())
        fractions.append(clipped / max(counts[-1], 1))
    return jax.tree.map(np.subtract, adapter, start), counts, fractions


@pytest.fixture(scope="module")
def bare():
    return small.run(noise_std=0)


def test_noise_free_uploads_are_those_of_a_naive_loop(bare):
    """Sampling, clipping of each record, the public divisor and two local steps; some samples exceed their capacity."""
    _, public, private = bare
    keys = {purpose: value[0] for purpose, value in secrets.round_keys(small.SECRETS, [1], 0).items()}
    for client in range(len(small.SIZES)):
        expected, counts, fractions = naive_upload(client, small.adapter(), keys, small.records())
        jax.tree.map(lambda x, y, k=client: close(x[0, k], y), public["uploads"], expected)
        np.testing.assert_array_equal(private["sampled"][0, client], counts)
        close(private["clip_fraction"][0, client], fractions)
    assert 0 < private["clip_fraction"].mean() < 1
    assert (private["sampled"] != small.DIVISORS[:, None]).mean() > 0.3


def test_no_client_fills_more_rows_than_its_own_capacity():
    private = small.run(join_below=2**30)[2]
    np.testing.assert_array_equal(private["sampled"], np.broadcast_to(np.array(small.CAPACITIES)[:, None], (3, 5, 2)))


def test_samples_differ_by_step_round_and_client():
    """All clients with one and the same records, rate and capacity would still see different samples."""
    scales = [dict(r, scale=np.exp(np.arange(len(r["scale"]), dtype=np.float32))) for r in small.records()]
    loss = small.run(data=scales, size=4, population=4, join_below=2**29, capacity=4)[2]["loss"]
    assert len(np.unique(loss)) > 20


def test_an_upload_sums_each_parts_learning_rate_times_its_noisy_gradients(bare):
    for _, public, _ in bare, small.run():
        for part, rate in small.RATES.items():
            expected = jax.tree.map(lambda g, rate=rate: -rate * g.sum(2), public["released"][part])
            jax.tree.map(close, public["uploads"][part], expected)


def test_the_server_takes_the_weighted_mean_with_momentum_and_averages_without_bias():
    """FedAvg by n_k / n; the average of adapters weighs round t by decay^(T - t), normalised."""
    state, public, _ = small.run()
    weights = np.array(small.SIZES) / sum(small.SIZES)
    adapter, velocity, adapters = small.adapter(), jax.tree.map(np.zeros_like, small.adapter()), []
    for index in range(len(small.ROUNDS)):
        mean = jax.tree.map(lambda u, i=index: np.tensordot(weights, u[i], 1), public["uploads"])
        velocity = jax.tree.map(lambda v, m: small.MOMENTUM * v + m, velocity, mean)
        adapter = jax.tree.map(lambda a, v: a + small.SERVER_RATE * v, adapter, velocity)
        adapters.append(adapter)
    jax.tree.map(close, state.adapter, adapter)
    decays = np.array([small.EMA**age for age in (2, 1, 0)])
    average = jax.tree.map(lambda *x: sum(d * a for d, a in zip(decays / decays.sum(), x, strict=True)), *adapters)
    jax.tree.map(close, state.average.mean, average)
    assert state.average.rounds == 3


def test_one_dispatch_of_three_rounds_is_three_of_one():
    state, shown = None, []
    for number in small.ROUNDS:
        state, public, _ = small.run(rounds=[number], state=state)
        shown.append(public)
    whole = small.run()
    jax.tree.map(close, state, whole[0])
    jax.tree.map(close, jax.tree.map(lambda *x: np.concatenate(x), *shown), whole[1])


def test_padding_clients_upload_nothing_even_with_keys():
    setup = small.Setup(rows=8)
    state, params, clients, data, keys = small.arguments(setup, small.ROUNDS)
    rng = np.random.default_rng(0)
    full = {name: np.array(value) for name, value in keys.items()}
    for value in full.values():
        value[:, 5:] = rng.integers(0, 2**32, value[:, 5:].shape, np.uint32)
    placed = {name: jax.device_put(full[name], keys[name].sharding) for name in keys}
    state, (public, private, valid) = small.compiled(setup, 3)(state, params, clients, data, placed)
    assert all((np.asarray(leaf)[:, 5:] == 0).all() for leaf in jax.tree.leaves(public["uploads"]))
    assert (np.asarray(private["sampled"])[:, 5:] == 0).all()
    assert (np.asarray(valid) == (np.arange(8) < 5)).all()
    jax.tree.map(close, jax.tree.map(np.array, state), small.run()[0])


def test_the_state_is_donated():
    arguments = small.arguments(small.Setup(), small.ROUNDS)
    small.compiled(small.Setup(), 3)(*arguments)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(arguments[0].adapter))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(arguments[1:]))


def test_the_program_puts_out_only_what_is_asked_for():
    """Without `transcript` and `diagnostics` there is the next state, and a flag for each upload: it counts or not."""
    shown = {}
    for transcript in (False, True):
        for diagnostics in (False, True):
            setup = small.Setup(transcript=transcript, diagnostics=diagnostics)
            arguments = small.arguments(setup, small.ROUNDS)
            state, (*told, valid) = jax.eval_shape(small.program(setup), *arguments)
            shown[transcript, diagnostics] = tuple(told)
            assert (valid.shape, valid.dtype) == ((3, 5), bool)
            like = jax.tree.map(lambda x: (x.shape, x.dtype), arguments[0])
            assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == like
    assert shown[False, False] == (None, None)
    assert shown[False, True][0] is None
    assert shown[True, False][1] is None
    assert set(shown[True, False][0]) == {"uploads", "released"}
    assert set(shown[False, True][1]) == {"loss", "clip_fraction", "sampled"}
    assert len(jax.tree.leaves(shown[True, True])) == 2 * len(jax.tree.leaves(small.adapter())) + 3


def with_scale(client, record, value):
    data = small.records()
    data[client]["scale"][record] = value
    return data


def test_noise_on_what_is_not_clipped_is_refused():
    local = small.federation(small.Setup()).local
    with pytest.raises(ValueError, match="hides only what is clipped"):
        dataclasses.replace(local, clipper=Unclipped())
    assert dataclasses.replace(local, clipper=Unclipped(), noise=NoNoise())


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e38])
def test_a_record_without_a_finite_gradient_counts_as_the_null_record(value):
    """Client 1 takes all its records in every step: the one that is not finite is always there."""
    poisoned = small.run(data=with_scale(1, 2, value))
    null = small.run(data=with_scale(1, 2, 0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(poisoned[:2]))
    jax.tree.map(close, poisoned[:2], null[:2])


@pytest.mark.parametrize("client", range(5))
def test_a_record_moves_a_sum_by_at_most_the_clipping_norm(client):
    """Each record in turn, large enough to be clipped, becomes the null record: the client's first noisy gradient moves
    by exactly clip_norm / divisor if the record joined, else not at all, and other clients' never move."""
    loud = [dict(r, scale=np.full_like(r["scale"], 1e4)) for r in small.records()]
    reference = small.run(data=loud, noise_std=0)
    bound, moved = small.CLIP / small.DIVISORS[client], 0
    for record in range(small.SIZES[client]):
        data = [{name: array.copy() for name, array in shard.items()} for shard in loud]
        data[client]["scale"][record] = 0
        released = small.run(data=data, noise_std=0)[1]["released"]
        change = jax.tree.map(lambda x, y: (x - y)[0, :, 0], released, reference[1]["released"])
        norms = np.sqrt(sum((leaf.reshape(5, -1) ** 2).sum(1) for leaf in jax.tree.leaves(change)))
        assert norms[client] == pytest.approx(bound, rel=1e-4) or norms[client] < 1e-7
        assert (np.delete(norms, client) == 0).all()
        moved += norms[client] > 0
    assert moved == reference[2]["sampled"][0, client, 0]


def test_replacing_a_record_by_any_other_moves_a_sum_by_at_most_twice_the_norm():
    reference, data = small.run(noise_std=0)[1]["released"], small.records()
    for name in ("input_ids", "labels"):
        data[1][name][0] = (data[1][name][0] + 1) % 3
    data[1]["scale"][0] = 1e6
    released = small.run(data=data, noise_std=0)[1]["released"]
    change = jax.tree.map(lambda x, y: (x - y)[0, 1, 0], released, reference)
    assert 0 < optax.tree.norm(change) <= 2 * small.CLIP / small.DIVISORS[1] * (1 + 1e-5)
