"""Trust modes `distributed` and `client` on the compiled program: what the aggregate is, its noise, and what can move it.

Secrets are fixed, so a passing test always passes; the false-alarm rates are over another choice of secrets.
"""

import functools

import jax
import numpy as np
import optax
import pytest

from dplora_jax.privacy import clipping, noise
from tests.federation import small
from tests.federation.test_round_noise import chi_square_bounds

pytestmark = pytest.mark.usefixtures("quick_compile")
TOTAL = small.Setup(local_steps=1, trust="distributed")
TRUSTED = small.Setup(trust="client")
TOTAL_DIVISOR, CLIENT_DIVISOR = small.DIVISORS.sum(), small.CLIENT_RATE * 5
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
ALL = np.ones(5)


def joined(trees):
    return jax.tree.map(lambda *x: np.concatenate(x), *trees)


def check_std(tree, std, alarm=1e-6):
    """Each leaf has mean 0 and deviation `std`."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        low, high = chi_square_bounds(leaf.size, alarm)
        ratio = np.sqrt((leaf.astype(float) ** 2).mean()) / std
        assert low < ratio < high, (jax.tree_util.keystr(path), ratio, low, high)
        assert abs(leaf.mean()) < 5 * std / np.sqrt(leaf.size)


def check_unrelated(tree, axes):
    """No two vectors of 48 draws over the `axes` leading axes and the leaves are correlated; false alarms: under 1e-4."""
    leaves = [leaf.reshape(*leaf.shape[:axes], -1) for leaf in jax.tree.leaves(tree)]
    vectors = np.concatenate([leaf[..., :48].reshape(-1, 48) for leaf in leaves if leaf.shape[-1] >= 48])
    correlation = np.corrcoef(vectors) - np.eye(len(vectors))
    assert len(vectors) > 50
    assert np.abs(correlation).max() < 0.8


def norm_of_change(one, other, number=0):
    return float(
        optax.tree.norm(jax.tree.map(lambda x, y: x[number] - y[number], one["aggregate"], other["aggregate"]))
    )


@pytest.fixture(scope="module")
def silent_total():
    """Attempts in which no record joins: shares and total are noise alone."""
    return [small.run(TOTAL, attempt=attempt, join_below=0)[1] for attempt in range(8)]


def test_a_share_is_the_clipped_sum_undivided_and_the_total_is_over_all_expected_batches():
    local, public = small.run(noise_std=0)[1], small.run(TOTAL, noise_std=0)[1]
    per_client = lambda x: x[0, :, 0] * small.DIVISORS.reshape(-1, *[1] * (x.ndim - 3))  # noqa: E731
    jax.tree.map(lambda x, y: close(x[0], per_client(y)), public["uploads"], local["released"])
    jax.tree.map(lambda x, y: close(x, y.sum(1) / TOTAL_DIVISOR), public["aggregate"], public["uploads"])


def test_the_total_carries_all_clients_noise_and_that_of_the_honest_is_sigma(silent_total):
    """A share has variance sigma^2 C^2 / h; the total, of K shares, sigma^2 C^2 K / h, over the divisor's square."""
    share = small.SIGMA * small.CLIP / np.sqrt(small.HONEST)
    check_std(joined([public["uploads"] for public in silent_total]), share)
    check_std(joined([public["aggregate"] for public in silent_total]), share * np.sqrt(5) / TOTAL_DIVISOR)


def test_no_shares_leaves_rounds_or_attempts_of_them_are_related(silent_total):
    check_unrelated(joined([public["uploads"] for public in silent_total]), 2)


def test_a_share_adds_noise_to_the_sum_of_real_gradients():
    """With and without noise: the aggregates differ by all clients' draws under their keys."""
    noisy, bare = small.run(TOTAL)[1], small.run(TOTAL, noise_std=0)[1]
    keys, std = small.keys_of(TOTAL, [1])["noise"][0], small.SIGMA * small.CLIP / np.sqrt(small.HONEST)
    drawn = [jax.jit(noise.gaussian)(key, small.adapter(), std, 0) for key in keys]
    expected = jax.tree.map(lambda *x: sum(x) / TOTAL_DIVISOR, *drawn)
    change = jax.tree.map(lambda x, y: x[0] - y[0], noisy["aggregate"], bare["aggregate"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), change, expected)


def test_the_server_steps_on_the_mean_gradient_and_holds_the_momentum():
    state, public, _ = small.run(TOTAL)
    adapter, velocity = small.adapter(), jax.tree.map(np.zeros_like, small.adapter())
    for index in range(3):
        for part, rate in small.RATES.items():
            step = jax.tree.map(lambda g, i=index, rate=rate: -rate * g[i], public["aggregate"][part])
            velocity[part] = jax.tree.map(lambda v, s: small.MOMENTUM * v + s, velocity[part], step)
        adapter = jax.tree.map(lambda a, v: a + small.SERVER_RATE * v, adapter, velocity)
    jax.tree.map(close, state.adapter, adapter)


def test_who_fails_to_send_is_in_no_total_and_too_few_void_the_round():
    """Four survivors are asked for: with four the total is theirs, with three nothing is released and nothing moves."""
    four = small.run(TOTAL, joins=[1, 1, 0, 1, 1])[1]
    others = jax.tree.map(lambda u: np.delete(u, 2, 1).sum(1) / TOTAL_DIVISOR, four["uploads"])
    jax.tree.map(close, four["aggregate"], others)
    before, _, _ = small.run(TOTAL)
    after, three, _ = small.run(TOTAL, state=before, joins=[1, 0, 0, 1, 1])
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(three["aggregate"]))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(before.server))


@pytest.mark.parametrize("fields", [{"local_steps": 2}, {"upload_bits": 8}])
def test_shares_that_are_more_than_a_term_of_the_total_are_refused(fields):
    """A share by itself has too little noise to be stepped on, or rounded."""
    with pytest.raises(ValueError, match="only a total of shares carries enough noise"):
        small.federation(TOTAL._replace(**fields))


@pytest.mark.parametrize("client", [0, 2])
def test_a_record_moves_the_total_by_at_most_clip_norm_over_the_divisor(client):
    """Replaced by the null record, and large enough to be clipped: by exactly that if it joined, else not at all."""
    loud = [dict(r, scale=np.full_like(r["scale"], 1e4)) for r in small.records()]
    reference, moved = small.run(TOTAL, data=loud, noise_std=0), 0
    for record in range(small.SIZES[client]):
        data = [{name: array.copy() for name, array in shard.items()} for shard in loud]
        data[client]["scale"][record] = 0
        change = norm_of_change(small.run(TOTAL, data=data, noise_std=0)[1], reference[1])
        assert change == pytest.approx(small.CLIP / TOTAL_DIVISOR, rel=1e-4) or change < 1e-7
        moved += change > 1e-7
    assert moved == reference[2]["sampled"][0, client, 0]


def plain_noise(number, attempt=0):
    """The server's noise of a round, undivided."""
    keys = small.keys_of(TRUSTED, [number], attempt)["server"][0]
    return jax.jit(noise.gaussian)(keys, small.adapter(), small.SERVER_STD, 0)


def test_the_server_averages_clipped_updates_of_those_who_joined_and_adds_its_noise():
    """Uniform weights, whatever a client's size; the divisor is the expected number of clients, not the one that joined."""
    joins = small.keys_of(TRUSTED, small.ROUNDS)["joins"]
    assert 0 < joins.mean() < 1
    _, public, _ = small.run(TRUSTED, weight=[0.9, 0, 0.1, 0, 0])
    norms = np.sqrt(sum((u.reshape(3, 5, -1).astype(float) ** 2).sum(2) for u in jax.tree.leaves(public["uploads"])))
    assert (norms <= small.UPDATE_CLIP * (1 + 1e-5)).all()
    assert (norms > small.UPDATE_CLIP * (1 - 1e-5)).any()
    for index, number in enumerate(small.ROUNDS):
        total = jax.tree.map(lambda u, i=index: np.tensordot(joins[i], u[i], 1), public["uploads"])
        expected = jax.tree.map(lambda t, n: (t + n) / CLIENT_DIVISOR, total, plain_noise(number))
        jax.tree.map(lambda x, y, i=index: close(x[i], y), public["aggregate"], expected)


def test_the_servers_noise_has_its_std_and_is_its_own_in_every_leaf_round_and_attempt():
    """Nobody joins. False alarms: 5 x 1e-6."""
    shown = [small.run(TRUSTED, attempt=attempt, joins=0 * ALL)[1]["aggregate"] for attempt in range(12)]
    check_std(joined(shown), small.SERVER_STD / CLIENT_DIVISOR)
    check_unrelated(joined(shown), 1)


@pytest.mark.parametrize("client", [1, 2])
def test_a_client_with_any_records_moves_the_aggregate_by_at_most_clip_norm_over_the_divisor(client):
    """Against a null client; by exactly that where its update is clipped, be its records 4 or 20; by nothing if it is absent."""

    def with_scale(value):
        data = small.records()
        data[client]["scale"][:] = value
        return data

    null = small.run(TRUSTED, data=with_scale(0), joins=ALL)[1]
    assert all(np.abs(u[0, client]).max() == 0 for u in jax.tree.leaves(null["uploads"]))
    for value in 1, 30, 1e3:
        change = norm_of_change(small.run(TRUSTED, data=with_scale(value), joins=ALL)[1], null)
        assert change <= small.UPDATE_CLIP / CLIENT_DIVISOR * (1 + 1e-4)
    assert change == pytest.approx(small.UPDATE_CLIP / CLIENT_DIVISOR, rel=1e-4)
    for value in np.inf, np.nan, 1e38:  # an update that is not finite is a null client's
        assert norm_of_change(small.run(TRUSTED, data=with_scale(value), joins=ALL)[1], null) == 0
    absent = np.where(np.arange(5) == client, 0, 1)
    away = [small.run(TRUSTED, data=with_scale(value), joins=absent)[1] for value in (0, 1e3)]
    assert norm_of_change(*away) == 0


@pytest.mark.parametrize(
    ("setup", "shape"),
    [
        pytest.param(TOTAL, {"rows": 8}, id="distributed-8x1", marks=pytest.mark.slow),
        pytest.param(TRUSTED, {"rows": 4, "columns": 2, "wave": 2}, id="client-4x2-wave2", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_change_nothing(setup, shape):
    """Nor do padding clients: five fill neither eight rows, nor a wave of two on each of four."""
    one, other = small.run(setup), small.run(setup._replace(**shape))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), other, one)


@pytest.mark.parametrize("setup", [TOTAL, TRUSTED], ids=["distributed", "client"])
def test_without_a_transcript_no_upload_leaves_the_program(setup):
    """Nor the aggregate: there is the next state, which follows from it, and nothing else."""
    quiet = setup._replace(transcript=False, diagnostics=False)
    state, shown = jax.eval_shape(small.program(quiet), *small.arguments(quiet, small.ROUNDS))
    assert shown == (None, None, None)
    assert jax.tree.structure(state) == jax.tree.structure(small.federation(quiet).init(small.adapter()))


def test_clipping_is_of_the_whole_update_over_all_its_leaves():
    uploads = {"a": np.array([[3.0], [0.3], [np.nan], [0.0]]), "b": np.array([[4.0], [0.4], [1.0], [0.0]])}
    clipped = clipping.clip_each(uploads, 1.0)
    np.testing.assert_allclose(clipped["a"].ravel(), [0.6, 0.3, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"].ravel(), [0.8, 0.4, 0, 0], rtol=1e-6)
