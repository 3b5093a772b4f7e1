"""A dispatch's keys are those of the entry that paid for it."""

import types

import numpy as np
import pytest

from dplora_jax.privacy.accounting import Mechanism
from dplora_jax.privacy.ledger import Ledger
from experiments import dispatch, flags

MECHANISMS = [Mechanism(100, 0.2, 35, 1.1)]


@pytest.fixture
def keys(tmp_path):
    """`keys(name, *causes, seed=None)`: of the newest of so many charged dispatches, each of rounds 1 and 2."""

    def draw(name, *causes, seed=None):
        kept = Ledger(tmp_path / f"{name}.jsonl")
        for attempt, cause in enumerate(causes):
            kept.begin((1, 3), attempt, MECHANISMS, 1, {"mesh": cause})
        job = types.SimpleNamespace(secrets=[b"s" * 32], ledger=kept, config=flags.RunConfig(seed=seed, clients=1))
        return dispatch.round_keys(job, (1, 3), 0)["noise"]

    return draw


def test_a_replay_draws_the_same_keys_and_another_history_never_does(keys):
    """The second ledger is what a workdir that was put back to its start, and then ran on another mesh, would write."""
    first = keys("first", "one")
    assert np.array_equal(first, keys("first"))
    assert not np.isin(first, keys("second", "two")).any()
    assert not np.isin(first, keys("third", "two", "one")).any()


def test_a_seeds_keys_depend_on_nothing_else(keys):
    assert np.array_equal(keys("first", "one", seed=1), keys("second", "two", "one", seed=1))
