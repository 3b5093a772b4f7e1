"""Integer shares in the compiled program: each carries its part of the noise, and their sum is exact."""

import jax
import numpy as np
import pytest

from dplora_jax.federation import dispatch, storage
from tests.federation import small_federation as small
from tests.federation.test_round_noise import chi_square_bounds

pytestmark = pytest.mark.usefixtures("quick_compile")
SHARED = {"trust": "distributed", "noise": "hardened", "survivors": 3, "colluding": 1, "rank": 8, "rounds": 8}


@pytest.fixture(scope="module")
def job():
    made = small.federation(**SHARED)
    return job_of(made, made.prepare(small.shards()))


def job_of(made, prepared):
    """A Job of `made`, kept in memory."""
    kept = storage.InMemory()
    return made._job(prepared, kept, kept.secrets(3, made.config.privacy.seed), None)


def test_a_share_has_its_part_of_the_noise_and_not_all_of_it(job):
    """sigma / sqrt(h) of it, h = 2: with more, utility is lost; with less, the guarantee."""
    rounds, attempt = dispatch.charge(job, 0)
    drawn = jax.tree.leaves(dispatch.round_keys(job, rounds, attempt)["noise"])
    (sigma,) = {m.noise_multiplier for m in job.prepared.mechanisms}
    unit = 2.0**job.prepared.rounds.local.noise.bits
    for client in range(3):
        numbers = np.concatenate([leaf[:, client].ravel() for leaf in drawn]).astype(float)
        low, high = chi_square_bounds(len(numbers), 1e-6)
        ratio = np.sqrt((numbers**2).mean()) / (sigma * unit / np.sqrt(2))
        assert low < ratio < high, (ratio, low, high)
        assert not low < ratio / np.sqrt(2) < high, "too few numbers to tell sigma from its share"


def test_the_grid_has_room_for_the_total_of_all(job):
    noise = job.prepared.rounds.local.noise
    reach = sum(share.capacity + 17 * share.noise_multiplier for share in job.prepared.shares)
    assert reach * 2**noise.bits < 2**31 <= reach * 2 ** (noise.bits + 1) or noise.bits == 20


def test_the_servers_gradient_is_the_exact_sum_of_the_shares(job):
    """int32 all the way: a sum of their floats would have lost the last digits."""
    made = small.federation(**SHARED)
    prepared = made.prepare(small.shards())
    own = job_of(made, prepared)
    rounds, attempt = dispatch.charge(own, 0)
    from dplora_jax.federation import mesh

    placed = mesh.place_keys(made.mesh, dispatch.round_keys(own, (1, 2), attempt), 3)
    state = jax.tree.map(jax.numpy.array, prepared.state)
    arguments = state, prepared.params, prepared.placement.clients, prepared.placement.data, placed
    program = dispatch.compiled({}, made.config, prepared.rounds, made.mesh, arguments, transcript=True)
    shown = jax.tree.map(np.asarray, program(*arguments)[1][0])
    noise, rule = prepared.rounds.local.noise, prepared.rounds.rule
    unit = np.float32(made.config.privacy.clip_norm * 2.0**-noise.bits)

    def one(uploads, aggregate):
        assert uploads.dtype == np.int32
        total = uploads[0, :3].sum(0, dtype=np.int32)
        np.testing.assert_allclose(aggregate[0], unit * total.astype(np.float32) / np.float32(rule.divisor), rtol=3e-7)

    jax.tree.map(one, shown["uploads"], shown["aggregate"])
    assert rounds[0] == 1
