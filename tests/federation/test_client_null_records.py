"""A client that is accounted as one of more records than it has (`size_classes`): null records are drawn, take rows, and add
nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dplora_jax.federation import client, mesh
from dplora_jax.privacy import clipping, sampling, secrets
from dplora_jax.privacy.banded import Banded
from dplora_jax.privacy.hardened import Hardened
from dplora_jax.privacy.noise import Independent
from tests.federation import small

pytestmark = pytest.mark.usefixtures("quick_compile")
OWN, POPULATION, RATE, CAPACITY = 13, 20, 0.45, 7
DRAWS = 4000
OF = client.Client(0, OWN, POPULATION, sampling.threshold(RATE), CAPACITY, 1.0, 0.0, 1.0, 0.0, 0)


def by_host(rng, count, config):
    """What hardened noise samples by: the host's draws."""
    return rng.integers(0, 2**sampling.BITS, (count, config.local_steps, config.records)).astype(np.int32)


def by_keys(rng, count, config):
    return rng.integers(0, 2**32, (count, 4, 2), np.uint32)


@functools.cache
def samples(kind):
    """(rows, weights) of many first steps."""
    noise = Hardened(1.0, 8) if kind is by_host else Independent()
    config = client.LocalConfig(1, POPULATION, CAPACITY + 2, clipping.Clip(1.0), noise)
    keys = jnp.asarray(kind(np.random.default_rng(0), DRAWS, config))
    return jax.device_get(jax.jit(jax.vmap(lambda k: client.sample(config, OF, {"sampling": k}, 0)))(keys))


@pytest.mark.parametrize("kind", [by_keys, by_host])
def test_a_null_record_never_enters_a_batch_with_weight(kind):
    rows, weights = samples(kind)
    assert rows.max() < OWN  # nor is a neighbour's record read in its place
    assert set(np.unique(weights)) == {0, 1}
    chosen = np.zeros((DRAWS, OWN))
    np.add.at(chosen, (np.arange(DRAWS)[:, None], rows), weights)
    assert chosen.max() == 1
    assert (chosen.sum(0) > 0).all()


@pytest.mark.parametrize("kind", [by_keys, by_host])
def test_the_sample_is_one_of_all_records_null_ones_included(kind):
    """min(Binomial(n', q), capacity) join, of which a hypergeometric number are the client's own. False alarms: 1e-4; were the
    null records not drawn, 5.6 would join on average and not 4.5."""
    joined = np.arange(POPULATION + 1)
    kept = np.bincount(np.minimum(joined, CAPACITY), stats.binom.pmf(joined, POPULATION, RATE))
    law = sum(p * stats.hypergeom.pmf(np.arange(CAPACITY + 1), POPULATION, OWN, m) for m, p in enumerate(kept))
    counts = np.bincount(samples(kind)[1].sum(1).astype(int), minlength=CAPACITY + 1)
    assert len(counts) == CAPACITY + 1
    often = law * DRAWS > 5
    observed = [*counts[often], counts[~often].sum()]
    expected = np.array([*law[often], law[~often].sum()]) * DRAWS
    assert stats.chisquare(observed, expected * DRAWS / expected.sum()).pvalue > 1e-4


def test_parts_are_of_the_records_that_are_accounted():
    """With bands, a step samples from ceil(n' / bands) records, of which those beyond the client's own are null."""
    config = client.LocalConfig(3, POPULATION, 7, clipping.Clip(1.0), Banded(3, 3))
    of = OF._replace(join_below=2**30, capacity=7)
    keys = {name: value[0, 0] for name, value in secrets.round_keys(secrets.from_seed(0, 1), [1], 0).items()}
    for index in range(3):
        rows, weights = jax.jit(lambda keys, i=index: client.sample(config, of, keys, i))(keys)
        assert sorted(np.asarray(rows)[np.asarray(weights) > 0]) == list(range(index, OWN, 3))


def test_the_divisor_is_the_rate_times_the_clients_own_records():
    """And its weight follows these too; what it samples from is the mechanism's."""
    mechanisms = [dataclasses.replace(m, records=m.records + 5) for m in small.MECHANISMS]
    placed = mesh.place(small.grid_of(small.Setup()), small.records(), mechanisms, small.CLIP, 1)
    clients = jax.device_get(placed.clients)
    rates = np.array([m.sampling_rate for m in mechanisms])
    np.testing.assert_array_equal(clients.size, small.SIZES)
    np.testing.assert_array_equal(clients.population, np.array(small.SIZES) + 5)
    np.testing.assert_allclose(clients.divisor, rates * small.SIZES, rtol=1e-6)
    np.testing.assert_allclose(clients.weight, np.array(small.SIZES) / sum(small.SIZES), rtol=1e-6)
    assert placed.records == max(small.SIZES) + 5
    assert placed.sizes == list(small.SIZES)


def test_null_records_change_no_upload_of_a_whole_sample():
    """Client 1's four records and four null ones all join, in nine rows: it uploads what its four alone would. Of sixteen null
    ones too many join, and some of its own are displaced."""
    shown = []
    for records in (4, 8, 20):
        others = small.MECHANISMS
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                small, "MECHANISMS", [others[0], dataclasses.replace(others[1], records=records), *others[2:]]
            )
            one_step = small.Setup(local_steps=1)
            shown.append(small.run(one_step, noise_std=0, join_below=2**30, capacity=max(small.CAPACITIES)))
    alone, with_null, crowded = shown
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x[0, 1], y[0, 1], rtol=2e-5, atol=2e-6),
        with_null[1]["uploads"],
        alone[1]["uploads"],
    )
    assert (with_null[2]["sampled"][:, 1] == 4).all()
    assert crowded[2]["sampled"][:, 1].min() < 4
