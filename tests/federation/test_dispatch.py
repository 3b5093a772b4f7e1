"""A dispatch's keys are those of the entry that paid for it."""

import types

import numpy as np
import pytest

from dplora_jax.config import FederationConfig, replace
from dplora_jax.errors import InputError
from dplora_jax.federation import dispatch
from dplora_jax.privacy import noise
from dplora_jax.privacy.accounting import Mechanism
from dplora_jax.privacy.ledger import Ledger

MECHANISMS = [Mechanism(100, 0.2, 35, 1.1)]


def job_of(ledger, folder, mechanisms=MECHANISMS, data=b"d" * 32, base=b"b" * 32, **changes):
    """A run of four rounds with this `ledger`."""
    fields = {"rounds": 4, "dispatch_rounds": 2, "eval_every": 0, "clients": 1, "epsilon": 8.0, "delta": 1e-3}
    rounds = types.SimpleNamespace(local=types.SimpleNamespace(noise=noise.INDEPENDENT))
    prepared = types.SimpleNamespace(
        mechanisms=mechanisms, shares=mechanisms, rounds=rounds, state=types.SimpleNamespace(adapter={}), sizes=[100]
    )
    kept = types.SimpleNamespace(ledger=ledger, directory=folder, config_digest=lambda: "c0")
    described = {"release": "for release", "communication": {"adapter_parameters": 9}}
    secrets, config = [b"s" * 32], replace(FederationConfig(), **(fields | changes))
    inputs = dispatch.keyed_inputs(secrets, base, data)
    return dispatch.Job(config, prepared, kept, secrets, inputs, described, None, {})


@pytest.fixture
def keys(tmp_path):
    """`keys(name, *nonces, seed=None)`: of the newest of so many charged dispatches, each of rounds 1 and 2."""

    def draw(name, *nonces, seed=None):
        kept = Ledger(tmp_path / f"{name}.jsonl")
        for attempt, nonce in enumerate(nonces):
            kept.begin((1, 3), attempt, MECHANISMS, 1, {}, nonce=nonce)
        return dispatch.round_keys(job_of(kept, tmp_path, seed=seed), (1, 3), 0)["noise"]

    return draw


def test_an_entry_has_keys_of_its_own_and_another_history_never_draws_them(keys):
    """The second ledger is what a workdir that was put back to its start would write."""
    first = keys("first", "01")
    assert np.array_equal(first, keys("first"))
    assert not np.isin(first, keys("second", "02")).any()
    assert not np.isin(first, keys("third", "02", "01")).any()


def test_a_seeds_keys_depend_on_nothing_else(keys):
    assert np.array_equal(keys("first", "01", seed=1), keys("second", "02", "01", seed=1))


@pytest.fixture
def job(tmp_path):
    """`job(mechanisms, **fields)`: a run whose ledger is read anew, as at its next start."""
    return lambda *mechanisms, **fields: job_of(Ledger(tmp_path / "charged.jsonl"), tmp_path, *mechanisms, **fields)


def test_a_lost_dispatch_stays_paid_for_and_draws_new_keys_whatever_is_the_same(job, capsys):
    keys = []
    for attempt in range(2):
        begun = job()
        assert dispatch.charge(begun, 0) == ((1, 3), attempt)
        assert begun.ledger.charged_rounds() == 2 * (attempt + 1)
        keys.append(dispatch.round_keys(begun, (1, 3), attempt)["noise"])
    assert not np.isin(*keys).any()
    assert "rounds 1 to 2 were lost: they stay paid for, and new noise is drawn" in capsys.readouterr().err
    assert dispatch.charge(job(), 0) is None  # four rounds are paid for: the budget is at its end


def test_with_a_seed_a_lost_dispatch_is_run_again_as_it_was(job):
    for _ in range(2):
        assert dispatch.charge(job(seed=1), 0) == ((1, 3), 0)
    assert job().ledger.charged_rounds() == 2


def test_the_same_charge_in_another_history_has_other_keys(job, tmp_path):
    seen = []
    for _ in range(2):
        begun = job()
        dispatch.charge(begun, 0)
        seen.append(dispatch.round_keys(begun, (1, 3), 0)["noise"])
        for path in tmp_path.iterdir():  # as a disk that is put back to its state before
            path.unlink()
    assert not np.isin(*seen).any()


def test_no_round_begins_that_would_take_a_client_past_its_epsilon(job):
    loud = job([Mechanism(100, 0.2, 35, 0.3)])
    with pytest.raises(InputError, match=r"rounds 1 to 2 would take a client to epsilon .* past 8;"):
        dispatch.charge(loud, 0)
    assert loud.ledger.entries == []


def test_other_noise_than_the_ledgers_is_refused(job):
    dispatch.charge(job(), 0)
    dispatch.check_past(job())
    with pytest.raises(InputError, match="other sampling or noise than the ledger"):
        dispatch.check_past(job([Mechanism(100, 0.2, 35, 1.0)]))


@pytest.mark.parametrize(
    ("inputs", "words"), [({"data": b"e" * 32}, "the records"), ({"base": b"e" * 32}, "the base model")]
)
def test_other_records_or_another_base_than_the_ledgers_are_refused(job, inputs, words):
    dispatch.charge(job(), 0)
    with pytest.raises(InputError, match=rf"{words} .* began with"):
        dispatch.check_past(job(**inputs))
