"""Correlated noise in the compiled round: its covariance over local steps, and steps that sample one part of the records each.

Secrets are fixed, so a passing test always passes; the false-alarm rates are over another choice of secrets.
"""

import functools

import jax
import numpy as np
import pytest

from dplora_jax.federation import client, mesh
from dplora_jax.privacy import accounting, clipping, noise, sampling, secrets
from dplora_jax.privacy.adaptive import Adaptive
from dplora_jax.privacy.banded import Banded
from tests.federation import small

pytestmark = pytest.mark.usefixtures("quick_compile")
STEPS, BANDS = 4, 2
SETUP = small.Setup(local_steps=STEPS, bands=BANDS)
ATTEMPTS = 8
STD = np.array(small.NOISES) * small.CLIP / small.DIVISORS
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
# C by hand: the coefficients 1, 1/2 of (1 - x)^-1/2, columns of norm 1.
C = np.eye(STEPS) + 0.5 * np.eye(STEPS, k=-1)
C /= np.linalg.norm(C, axis=0)
INVERSE = np.linalg.inv(C)


@pytest.fixture(scope="module")
def silent():
    """What several attempts release when nobody joins."""
    return [small.run(SETUP, attempt=attempt, join_below=0)[1] for attempt in range(ATTEMPTS)]


def test_noise_is_the_inverse_of_c_times_independent_draws_afresh_in_each_round(silent):
    draw = jax.jit(lambda keys, step: noise.gaussian(keys, small.adapter(), 1.0, step))
    for index, number in enumerate(small.ROUNDS[:2]):
        keys = secrets.round_keys(small.SECRETS, [number], 0)["noise"][0]
        for k in 0, 3:
            drawn = jax.tree.map(lambda *x: np.stack(x), *[draw(keys[k], step) for step in range(STEPS)])
            expected = jax.tree.map(lambda x, k=k: STD[k] * np.tensordot(INVERSE, x, 1), drawn)
            jax.tree.map(lambda x, y, at=(index, k): close(x[at], y), silent[0]["released"], expected)


def test_noise_covariance_over_steps_and_rounds_is_block_diagonal_of_c_inverse(silent):
    """12 x 12 over three rounds' steps; false alarms: under 1e-6 (144 entries, 6 standard errors each)."""
    rows = []
    for public in silent:
        for leaf in jax.tree.leaves(public["released"]):
            scaled = (leaf / STD.reshape(1, -1, *[1] * (leaf.ndim - 2))).swapaxes(1, 2)
            rows.append(scaled.reshape(len(small.ROUNDS) * STEPS, -1))
    values = np.concatenate(rows, 1).astype(float)
    expected = np.kron(np.eye(len(small.ROUNDS)), INVERSE @ INVERSE.T)
    spread = np.sqrt((expected**2 + np.outer(np.diag(expected), np.diag(expected))) / values.shape[1])
    assert (np.abs(values @ values.T / values.shape[1] - expected) < 6 * spread).all()
    assert values.shape[1] > 10_000


def test_an_upload_carries_less_noise_than_of_independent_steps(silent):
    """Its variance is that of the last prefix sum: 2.55 times one step's in place of 4. False alarms: under 1e-6 a leaf."""
    factor = (np.ones(STEPS) @ INVERSE) ** 2
    assert factor.sum() == pytest.approx(2.55, abs=0.01)
    uploads = jax.tree.map(lambda *x: np.concatenate(x), *[public["uploads"] for public in silent])
    for part, rate in small.RATES.items():
        values = [
            (x / STD.reshape(1, -1, *[1] * (x.ndim - 2)) / rate).reshape(-1) for x in jax.tree.leaves(uploads[part])
        ]
        values = np.concatenate(values).astype(float)
        assert (values**2).mean() == pytest.approx(factor.sum(), rel=5 * np.sqrt(2 / values.size))


def test_a_step_samples_from_its_own_part_of_the_records():
    """Only records of even index have a gradient: steps 1 and 3 release nothing, steps 0 and 2 something."""
    data = small.records()
    for shard in data:
        shard["scale"][1::2] = 0
    _, public, private = small.run(SETUP, data=data, noise_std=0, join_below=2**30)
    released = [np.abs(leaf).reshape(*leaf.shape[:3], -1).max(-1) for leaf in jax.tree.leaves(public["released"])]
    assert (np.max(released, 0)[:, :, 1::2] == 0).all()
    assert (np.max(released, 0)[:, :, 0::2] > 0).all()
    sizes, capacities = np.array(small.SIZES), np.array(small.CAPACITIES)
    for step in range(STEPS):
        whole = np.minimum((sizes + (1, 0)[step % 2]) // 2, capacities)  # an odd size's second part is one short
        assert (private["sampled"][:, :, step] <= whole).all()
        assert (private["sampled"][:, :, step] >= whole - 1).all()  # its null record may take a row


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_part_is_all_its_records_once_and_a_null_record_where_it_is_short(index):
    config = client.LocalConfig(3, 8, 3, clipping.Clip(1.0), Banded(3, 3))
    of = client.Client(0, 8, 8, 2**30, 3, 1.0, 0.0, 1.0, 0.0, 0)
    keys = {name: value[0, 0] for name, value in secrets.round_keys(secrets.from_seed(0, 1), [1], 0).items()}
    rows, weights = jax.jit(lambda keys: client.sample(config, of, keys, index))(keys)
    assert sorted(np.asarray(rows)[np.asarray(weights) > 0]) == list(range(index, 8, 3))


def test_parts_join_at_their_own_rate_and_the_expected_batch_stays():
    mechanisms = [accounting.Mechanism(n, 0.25, 9, 1.0, count_noise=2.0, bands=BANDS) for n in small.SIZES]
    clients = jax.device_get(mesh.place(small.grid_of(SETUP), small.records(), mechanisms, 1.0, 1).clients)
    assert (clients.join_below[:5] == sampling.threshold(0.5)).all()
    close(clients.divisor[:5], 0.25 * np.array(small.SIZES))
    assert (clients.count_std[:5] == 2.0).all()


@pytest.mark.parametrize(
    ("steps", "clipper", "noise", "words"),
    [
        (3, clipping.Clip(1.0), Banded(3, 2), r"bands \(2\) must divide local_steps"),
        (2, clipping.Clip(1.0), Banded(4, 2), r"local_steps \(2\), the noise's own \(4\)"),
        (4, Adaptive(1.0), Banded(4, 2), "has one scale"),
    ],
)
def test_turns_cut_short_and_noise_of_a_moving_scale_are_refused(steps, clipper, noise, words):
    with pytest.raises(ValueError, match=words):
        client.LocalConfig(steps, 8, 4, clipper, noise)
