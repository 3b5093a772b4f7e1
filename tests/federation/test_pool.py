"""Pooled rows change nothing but the time: every client's sums are its own, whatever was sampled."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import scipy.stats

from dplora_jax.federation import pool
from dplora_jax.privacy import accounting
from dplora_jax.privacy.hardened import Hardened
from tests.conftest import mostly_slow
from tests.federation import small

pytestmark = pytest.mark.usefixtures("quick_compile")
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
ALONE = small.Setup(local_steps=1)
WHOLE = pool.rows(small.MECHANISMS)
POOLED = ALONE._replace(wave=5, pool=WHOLE)


SETUPS = {
    "all at once": POOLED,
    "a pool that always overflows": ALONE._replace(wave=5, pool=1, microbatch=3),
    "2x2, padding clients": ALONE._replace(rows=2, columns=2, wave=3, pool=7, microbatch=4),
}


@pytest.mark.parametrize("name", mostly_slow(["all at once", "a pool that always overflows"], SETUPS))
def test_a_pool_releases_what_clients_apart_release(name):
    """Uploads, noisy gradients, the next state and each client's private statistics."""
    one, other = small.run(ALONE), small.run(SETUPS[name])
    jax.tree.map(close, other, one)
    assert one[2]["sampled"].max() > 3


MODES = [{"trust": "distributed"}, {"clipping": "per_layer"}, {"method": "rolora"}]


@pytest.mark.parametrize("fields", mostly_slow(MODES[:1], MODES))
def test_so_it_does_in_other_modes(fields):
    one, other = small.run(ALONE._replace(**fields)), small.run(ALONE._replace(**fields, wave=5, pool=WHOLE))
    jax.tree.map(close, other, one)


def test_no_row_enters_another_clients_sum():
    """All of a client's records made null move its own noisy gradient alone."""
    setup = ALONE._replace(wave=5, pool=WHOLE)
    data = small.records()
    for client in (0, 3):
        changed = [dict(own) for own in data]
        changed[client]["scale"] = np.zeros_like(changed[client]["scale"])
        before, after = (small.run(setup, data=rows)[1]["released"] for rows in (data, changed))
        moved = [
            max(np.abs(a[0, k] - b[0, k]).max() for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
            for k in range(5)
        ]
        assert moved[client] > 1e-3
        assert max(moved[:client] + moved[client + 1 :]) < 1e-6


@pytest.mark.parametrize("pooled", [WHOLE, 1])
def test_how_long_it_takes_follows_public_sizes_unless_the_pool_overflows(pooled):
    """Turns of two rows: as many as the pool asks for under each of twenty samples, more only where more joined."""
    taken = []
    local = dataclasses.replace(small.federation(ALONE).local, microbatch=2)
    _, params, clients, data, keys = small.arguments(ALONE, range(20))

    def loss(adapter, batch):
        jax.debug.callback(lambda: taken.append(1))
        return small.loss(small.model_and_params()[0], params)(adapter, batch)

    run = jax.jit(
        lambda keys: pool.Pooled(pooled).prepare(loss, local, data, small.adapter(), clients, keys).weights.sum()
    )
    for index in range(20):
        taken.clear()
        joined = int(run(jax.tree.map(lambda x, i=index: x[i], keys)))
        jax.effects_barrier()
        size = pool.at_a_time(pooled, 2)
        assert len(taken) == max(-(-pooled // size), -(-joined // size))


def test_a_pool_holds_all_rows_but_for_a_chance_of_one_in_a_billion():
    alone = accounting.Mechanism(775, 64 / 775, 775, 1.0)
    rows = pool.rows([alone])
    assert scipy.stats.binom.sf(rows, 775, 64 / 775) <= pool.OVERFLOW < scipy.stats.binom.sf(rows - 1, 775, 64 / 775)
    many = pool.rows([alone] * 5)
    of_all = scipy.stats.binom(5 * 775, 64 / 775)
    assert of_all.sf(many) == pytest.approx(pool.OVERFLOW, rel=0.5)
    assert of_all.sf(many) <= pool.OVERFLOW * (1 + 1e-6)
    assert many < 0.85 * 5 * 105  # of five clients' own capacities


def test_a_pool_is_never_larger_than_its_clients_capacities():
    tight = dataclasses.replace(accounting.Mechanism(775, 64 / 775, 775, 1.0), capacity=50)
    assert pool.rows([tight, tight]) == 100


def test_turns_are_of_one_size():
    assert pool.at_a_time(100, 30) == 25
    assert pool.at_a_time(20, 30) == 20


@pytest.mark.parametrize("fields", [{"method": "fedsa"}, {"partial": True}])
def test_what_cannot_be_pooled_among_clients_is_refused(fields):
    with pytest.raises(ValueError, match="every client starts from one adapter and takes part"):
        small.federation(ALONE._replace(wave=5, pool=WHOLE, **fields))


@pytest.mark.parametrize("client", [0, 3])
def test_a_record_moves_its_clients_pooled_sum_by_at_most_the_clipping_norm_and_no_others(client):
    """Each record in turn, loud enough to be clipped, becomes the null record."""
    loud = [dict(r, scale=np.full_like(r["scale"], 1e4)) for r in small.records()]
    reference = small.run(POOLED, data=loud, noise_std=0)
    moved = 0
    for record in range(small.SIZES[client]):
        data = [{name: array.copy() for name, array in shard.items()} for shard in loud]
        data[client]["scale"][record] = 0
        released = small.run(POOLED, data=data, noise_std=0)[1]["released"]
        change = jax.tree.map(lambda x, y: (x - y)[0], released, reference[1]["released"])
        norms = np.sqrt(sum((leaf.reshape(5, -1) ** 2).sum(1) for leaf in jax.tree.leaves(change)))
        bound = small.CLIP / small.DIVISORS[client]
        assert norms[client] == pytest.approx(bound, rel=1e-4) or norms[client] < 1e-6
        assert np.delete(norms, client).max() < 1e-6
        moved += norms[client] > 1e-6
    assert moved == reference[2]["sampled"][0, client, 0] > 0


def test_a_pooled_record_without_a_finite_gradient_counts_as_the_null_record():
    """Client 1 takes all its records in every step: the one that is not finite is always there."""
    data = {value: small.records() for value in (np.inf, 0)}
    for value, rows in data.items():
        rows[1]["scale"][2] = value
    poisoned, null = (small.run(POOLED, data=rows) for rows in data.values())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(poisoned[:2]))
    jax.tree.map(close, poisoned[:2], null[:2])


@pytest.mark.parametrize(
    "fields", [{"local_steps": 2}, {"clipping": "adaptive"}, {"ranks": (1, 2, 1, 2, 1)}, {"trust": "client"}]
)
def test_what_cannot_be_pooled_in_a_step_is_refused(fields):
    with pytest.raises(ValueError, match="pooled in a single local step"):
        small.federation(ALONE._replace(wave=5, pool=WHOLE, **fields))


def test_integers_are_not_pooled():
    made = small.federation(ALONE)
    local = dataclasses.replace(made.local, noise=Hardened(small.CLIP, 16))
    with pytest.raises(ValueError, match="in floating point"):
        dataclasses.replace(made, local=local, rows=pool.Pooled(WHOLE))
