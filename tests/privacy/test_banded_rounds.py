"""Noise over rounds is C^-1 z: the matrix that is accounted, each round's own draw again in later ones, parts that never meet."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax.federation import client
from dplora_jax.privacy import accounting, clipping, noise, secrets
from dplora_jax.privacy.accounting import Mechanism
from dplora_jax.privacy.banded_rounds import BandedRounds, coefficients
from dplora_jax.privacy.ledger import InMemoryLedger

ROUNDS, BANDS, MOMENTUM, STD = 6, 3, 0.9, 2.0
NOISE = BandedRounds(ROUNDS, BANDS, MOMENTUM)
DELTA = 1e-5


def matrix(rounds=ROUNDS, bands=BANDS, momentum=MOMENTUM):
    """C [rounds, rounds] float64."""
    return sum(np.eye(rounds, k=-k) * float(c) for k, c in enumerate(coefficients(bands, momentum)))


def keys_of(clients, dispatches=((1, ROUNDS + 1),), noise=NOISE):
    """The keys of all rounds of `clients`, as dispatches of [a, b) rounds draw them."""
    own = [secrets.round_keys(secrets.from_seed(5, clients), range(*of), 0) for of in dispatches]
    made = [noise.going_on(keys, [before["noise"] for before in own[:index]]) for index, keys in enumerate(own)]
    return jax.tree.map(lambda *x: np.concatenate(x), *made)


@jax.jit
def added(keys):
    """What is added to a sum of one parameter [rounds, K], by the "noise" of `keys_of`."""
    one = lambda keys: NOISE.add((jnp.zeros(()), {}), STD, keys, 0, ())[0][0]  # noqa: E731
    return jax.lax.map(jax.vmap(one), keys)


@pytest.mark.parametrize("bands", [2, 3, 5, 32, 300])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.999])
def test_the_columns_have_norm_at_most_one_in_exact_arithmetic_and_hardly_less(bands, momentum):
    """Falling coefficients have no root inside the unit circle (Enestrom and Kakeya), so that C^-1 does not grow."""
    c = coefficients(bands, momentum)
    assert c.dtype == np.float32
    assert 1 - 1e-6 < sum(Fraction(float(x)) ** 2 for x in c) <= 1
    assert (np.diff(c) < 0).all()


def test_the_matrix_that_is_undone_is_the_one_that_is_accounted(monkeypatch):
    """C, of what is really added: unit draws in the place of normal ones."""

    def unit(keys, tree, std, step):
        return jax.tree.map(lambda x: std * jax.nn.one_hot(keys[0, 0], ROUNDS), tree)

    monkeypatch.setattr(noise, "gaussian", unit)
    block = np.zeros((ROUNDS, 4, 2), np.uint32)
    block[:, 0, 0] = np.arange(ROUNDS)
    add = lambda place: NOISE.add(jnp.zeros(ROUNDS), 1.0, {"keys": jnp.array(block), "place": place}, 0, ())[0]  # noqa: E731
    rows = [add(place) for place in range(ROUNDS)]
    np.testing.assert_allclose(np.linalg.inv(np.array(rows, float)), matrix(), atol=2e-6)


def test_the_noise_has_the_covariance_of_c_inverse():
    """21 distinct entries of 20,000 clients; false alarms: under 1e-6 (6 standard errors each)."""
    values = np.array(added(keys_of(20_000)["noise"]), float)
    expected = STD**2 * np.linalg.inv(matrix().T @ matrix())
    spread = np.sqrt((expected**2 + np.outer(np.diag(expected), np.diag(expected))) / values.shape[1])
    assert (np.abs(values @ values.T / values.shape[1] - expected) < 6 * spread).all()


def test_a_past_rounds_draw_is_the_same_in_each_later_round():
    """C times what was added is, in each round, the draw of its own key alone."""
    own = secrets.round_keys(secrets.from_seed(5, 3), range(1, ROUNDS + 1), 0)["noise"]
    drawn = jax.vmap(jax.vmap(lambda keys: noise.gaussian(keys, (jnp.zeros(()), {}), STD, 0)[0]))(own)
    np.testing.assert_allclose(matrix() @ np.array(added(keys_of(3)["noise"])), drawn, atol=1e-5)


@pytest.mark.parametrize("dispatches", [((1, 3), (3, 7)), ((1, 2), (2, 6), (6, 7))])
def test_how_rounds_are_cut_into_dispatches_changes_no_bit(dispatches):
    whole, cut = keys_of(3), keys_of(3, dispatches)
    np.testing.assert_array_equal(added(whole["noise"]), added(cut["noise"]))
    jax.tree.map(np.testing.assert_array_equal, whole["sampling"], cut["sampling"])


def test_parts_are_disjoint_and_cover_all_records_within_the_bands_of_a_block():
    """Everyone of a part joins: so each round has its whole part, and `bands` of them each record once."""
    records = 11
    local = client.LocalConfig(1, records, 4, clipping.Clip(1.0), NOISE)
    of = client.Client(0, records, records, 2**30, 4, 1.0, 1.0, 1.0, 0.0, 0)
    keys = jax.tree.map(lambda x: x[:, 0], keys_of(1))
    rows, weights = jax.vmap(lambda keys: client.sample(local, of, keys, 0))({"sampling": keys["sampling"]})
    seen = [sorted(np.asarray(r)[np.asarray(w) > 0].tolist()) for r, w in zip(rows, weights, strict=True)]
    assert seen == [list(range(place % BANDS, records, BANDS)) for place in range(ROUNDS)]


def test_a_dispatch_has_room_for_its_keys():
    """Each of its rounds has those of its whole block."""
    assert NOISE.most_rounds(3, 10**6, None) > 10**5
    assert BandedRounds(1000, BANDS).most_rounds(1000, 9, None) * 32 * 10**6 <= 64 << 20
    assert BandedRounds(10**6, BANDS).most_rounds(1000, 9, None) == 1


def charged(*dispatches, bands=BANDS):
    """The ledger of one client that began these [a, b) rounds."""
    ledger = InMemoryLedger()
    for attempt, rounds in enumerate(dispatches):
        ledger.begin(rounds, attempt, [Mechanism(90, 0.2, 30, 1.2, bands=bands)], 1, {})
    return ledger


def test_rounds_of_one_block_cost_what_they_were_calibrated_for():
    (made,) = accounting.calibrate([90], 18, ROUNDS, 4.0, DELTA, bands=BANDS)
    ledger = InMemoryLedger()
    for rounds in (1, 3), (3, 7):
        ledger.begin(rounds, 0, [made], 1, {})
    (spent,) = ledger.epsilons(DELTA)
    assert 3.9 < spent <= 4.0
    assert spent == accounting.epsilon(Mechanism(30, made.join_rate, made.capacity, made.noise_multiplier), 2, DELTA)


@pytest.mark.parametrize(
    ("dispatches", "steps"),
    [
        ([(1, 3), (3, 6)], 5),
        ([(1, 3), (3, 5), (3, 5)], 6 + 2),  # four rounds of a block that was lost are two turns
        ([(1, 3), (1, 3), (1, 3)], 3 + 3 + 2),
        ([(1, 4), (4, 7), (4, 7)], 6 + 3),
    ],
)
def test_a_block_that_a_loss_ends_is_paid_for_in_whole_turns(dispatches, steps):
    ledger = charged(*dispatches)
    assert ledger.charged_steps(1) == [steps]
    step = Mechanism(90, 0.2, 30, 1.2, bands=BANDS)
    assert ledger.epsilons(DELTA) == [accounting.epsilon(step, steps, DELTA)]
    assert charged(*dispatches, bands=1).charged_steps(1) == [sum(b - a for a, b in dispatches)]


def test_a_second_attempt_goes_on_from_nothing_before_it():
    ledger = charged((1, 3), (3, 5), (3, 5), (5, 6))
    assert [entry["attempt"] for entry in ledger.block()] == [2, 3]
    assert [entry["attempt"] for entry in charged((1, 3), (3, 5), (3, 5)).block()] == [2]
    assert charged().block() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [({"local_steps": 2}, "one local step"), ({"upload": True}, "rounded by the keys of one round")],
)
def test_rounds_of_several_steps_and_rounded_uploads_are_refused(options, words):
    from dplora_jax.federation import compression

    if "upload" in options:
        options = {"local_steps": 1, "upload": compression.Rounded(8)}
    with pytest.raises(ValueError, match=words):
        client.LocalConfig(records=8, capacity=4, clipper=clipping.Clip(1.0), noise=NOISE, **options)
