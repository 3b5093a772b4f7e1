"""Silos that share no machine give what one compiled program gives, and each keeps its own ledger."""

import jax
import numpy as np
import pytest

from dplora_jax import losses
from dplora_jax.config import replace
from dplora_jax.errors import InputError
from dplora_jax.federation import calibration, storage
from dplora_jax.federation.federation import Federation
from dplora_jax.federation.silo import Server, Silo
from dplora_jax.privacy.ledger import Ledger
from tests.conftest import mostly_slow
from tests.federation import small_federation as small

pytestmark = pytest.mark.usefixtures("quick_compile")


SIZES = [16, 16, 16]  # alike, so that the silos of a variant share a compiled round
PROGRAMS = {}


def shards():
    return [small.rows(size, seed) for seed, size in enumerate(SIZES)]


def silo(client, workdir=None, records=None, **fields):
    config, records = small.config(**fields), records or shards()[client]
    return Silo(
        *small.model(), losses.classification, config, client=client, records=records, sizes=SIZES, workdir=workdir,
        programs=PROGRAMS.setdefault(replace(config, seed=None), {}),
    )  # fmt: skip


def server(**fields):
    return Server(*small.model(), losses.classification, small.config(**fields), SIZES)


def rounds(silos, made, numbers, order=None):
    """The server `made` after rounds `numbers` of `silos` {client: Silo}."""
    for number in numbers:
        uploads = {client: silos[client].fit(made.adapter, number) for client in (order or silos)}
        made.aggregate(uploads)
    return made


VARIANTS = {
    "fedavg": {},
    "adam": {"client_optimizer": "adam", "client_lr": 1e-2, "local_steps": 2},
    "frozen A": {"freeze_a": True},
    "rolora": {"aggregation": "rolora"},
    "flexlora": {"aggregation": "flexlora", "ema": 0.0},
    "adaptive": {"clipping": "adaptive", "local_steps": 2},
    "banded": {"noise": "banded", "local_steps": 2},
    "hardened": {"noise": "hardened"},
    "no privacy": {"trust": "none", "epsilon": None},
    "server's optimizer": {"server_optimizer": "adam", "server_momentum": 0.0, "server_lr": 0.1},
    "rounded uploads": {"upload_bits": 8},
}


@pytest.mark.parametrize("name", mostly_slow(("fedavg",), VARIANTS))
def test_by_the_same_seed_silos_give_the_adapter_of_one_program(name):
    fields = VARIANTS[name] | {"rounds": 2}
    whole = Federation(*small.model(), losses.classification, small.config(**fields))
    list(whole.fit(shards(), storage.InMemory()))
    made = rounds({k: silo(k, **fields) for k in range(3)}, server(**fields), (1, 2))
    released = jax.tree.map(np.asarray, made.released)
    expected = whole.adapter if not fields.get("freeze_a") else jax.tree.map(np.asarray, whole._state.average.mean)
    moved = jax.tree.map(lambda x: np.abs(x).max(), expected)
    assert max(jax.tree.leaves(moved)) > 1e-2
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6), released, expected)


def test_the_order_of_arrival_changes_no_bit():
    one = rounds({k: silo(k) for k in range(3)}, server(), (1, 2))
    other = rounds({k: silo(k) for k in range(3)}, server(), (1, 2), order=[2, 0, 1])
    jax.tree.map(np.testing.assert_array_equal, one.adapter, other.adapter)


def test_a_silo_charges_its_own_ledger_before_it_runs(tmp_path, monkeypatch):
    """A crash inside the program leaves the charge, and the round runs again with other noise, paid for again."""
    start = server(seed=None).adapter
    with silo(1, tmp_path / "silo", seed=None) as party:

        def crash(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as broken:
            broken.setattr(Silo, "_program", crash)
            with pytest.raises(KeyboardInterrupt):
                party.fit(start, 1)
    ledger = Ledger(tmp_path / "silo" / "privacy_ledger.jsonl")
    assert ledger.charged_rounds() == 1
    assert len(ledger.begun[0]["clients"]) == 1
    with silo(1, tmp_path / "silo", seed=None) as party:
        party.fit(start, 1)
        assert party.done == 1
    ledger = Ledger(tmp_path / "silo" / "privacy_ledger.jsonl")
    assert ledger.charged_rounds() == 2
    assert [entry["attempt"] for entry in ledger.begun] == [0, 1]
    assert not ledger.open_entry()


def test_a_round_that_is_asked_for_again_draws_new_noise_and_is_paid_for_again():
    party, start = silo(0, seed=None), server(seed=None).adapter
    first, again = party.fit(start, 1), party.fit(start, 1)
    assert not np.array_equal(first["head"]["kernel"], again["head"]["kernel"])
    once = calibration.mechanisms(party.config, SIZES)[0]
    assert party.epsilon > 0
    assert party._job.ledger.charged_steps(1) == [2]
    assert once.records == SIZES[0]


def test_a_silo_goes_on_where_it_was(tmp_path):
    whole, made = {k: silo(k) for k in range(3)}, server()
    rounds(whole, made, (1, 2, 3))
    other = server()
    for number in (1, 2, 3):
        uploads = {}
        for client in range(3):
            with silo(client, tmp_path / str(client)) as party:
                assert party.done == number - 1
                uploads[client] = party.fit(other.adapter, number)
        other.aggregate(uploads)
    jax.tree.map(np.testing.assert_array_equal, made.adapter, other.adapter)


@pytest.mark.parametrize("number", [0, 2, 3, -1])
def test_any_round_but_the_next_charges_nothing(number):
    party = silo(0)
    with pytest.raises(InputError, match="does not follow round 0"):
        party.fit(server().adapter, number)
    assert party._job.ledger.entries == []


def test_a_share_without_masks_never_leaves_a_silo():
    """It has a part of the noise alone; nothing is computed, and nothing charged."""
    fields = {"trust": "distributed", "noise": "hardened", "survivors": 2, "colluding": 1}
    party = silo(0, **fields)
    with pytest.raises(InputError, match="has to be masked before it is sent"):
        party.fit(party.template, 1)
    assert party._job.ledger.entries == []


def test_no_round_is_run_past_the_epsilon():
    """Four rounds are planned: a fourth attempt of the first leaves one, and then the budget is spent."""
    party, start = silo(2, seed=None), server(seed=None).adapter
    for _ in range(3):
        party.fit(start, 1)
    party.fit(start, 2)
    with pytest.raises(InputError, match="epsilon is spent"):
        party.fit(start, 3)
    assert 7.9 < party.epsilon <= 8


def test_a_missing_or_broken_upload_is_left_out():
    """As one that did not take part: the mean is over the others, by their weights."""
    made, other = server(), server()
    uploads = {k: silo(k).fit(made.adapter, 1) for k in range(3)}
    broken = jax.tree.map(lambda x: np.where(np.arange(x.size).reshape(x.shape) == 0, np.nan, x), uploads[1])
    one = made.aggregate({0: uploads[0], 2: uploads[2]})
    two = other.aggregate(uploads | {1: broken})
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(two))


def test_a_round_without_an_upload_leaves_the_adapter_as_it_was():
    made = server()
    before = jax.tree.map(np.array, made.adapter)
    jax.tree.map(np.testing.assert_array_equal, before, made.aggregate({}))


def test_a_part_that_was_ended_has_no_secret_and_no_further_round(tmp_path):
    with silo(0, tmp_path / "silo", seed=None) as party:
        party.fit(server(seed=None).adapter, 1)
        assert (tmp_path / "silo" / "private" / "secrets.json").exists()
        party.finish()
        with pytest.raises(InputError, match="secret is gone"):
            party.fit(server(seed=None).adapter, 2)
    assert not (tmp_path / "silo" / "private" / "secrets.json").exists()
    assert Ledger(tmp_path / "silo" / "privacy_ledger.jsonl").ended
    with pytest.raises(InputError, match="has ended its part"):
        silo(0, tmp_path / "silo", seed=None)
    assert not (tmp_path / "silo" / "private" / "secrets.json").exists()


def test_an_attempt_begins_where_the_round_began(tmp_path):
    """Not at the clip norm that the attempt before moved; and a silo that was closed between them is no other."""
    fields = VARIANTS["adaptive"]
    start = server(**fields).adapter
    with silo(0, **fields) as party:
        party.fit(start, 1)
        moved = np.asarray(party._state.clip_norms)
        assert moved != small.config(**fields).privacy.clip_norm
        assert np.asarray(party._before.clip_norms) == small.config(**fields).privacy.clip_norm
        party.fit(start, 1)
        assert np.asarray(party._before.clip_norms) == small.config(**fields).privacy.clip_norm
    with silo(0, tmp_path / "silo") as party:
        party.fit(start, 1)
        party.fit(start, 1)
    with silo(0, tmp_path / "silo") as party:
        assert party.done == 1
        party.fit(start, 2)
    assert Ledger(tmp_path / "silo" / "privacy_ledger.jsonl").charged_rounds() == 3


def test_what_a_silo_was_begun_with_may_not_be_edited(tmp_path):
    """Whoever edits silo.json and the configuration alike meets the digest in the ledger."""
    with silo(0, tmp_path / "silo") as party:
        party.fit(server().adapter, 1)
    path = tmp_path / "silo" / "silo.json"
    path.write_text(path.read_text().replace('"clip_norm": 1.0', '"clip_norm": 9.0'))
    with silo(0, tmp_path / "silo", clip_norm=9.0) as party, pytest.raises(InputError, match="another than the ledger"):
        party.fit(server().adapter, 2)
    assert Ledger(tmp_path / "silo" / "privacy_ledger.jsonl").charged_rounds() == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"trust": "client", "epsilon": None, "noise_multiplier": 1.0}, "not for silos"),
        ({"trust": "distributed", "survivors": 3, "colluding": 1}, "use noise=hardened"),
        ({"aggregation": "fedsa", "ema": 0.0}, "one adapter of one rank"),
        ({"aggregation": "fedex", "ema": 0.0}, "changes the base"),
        ({"participation": "fixed:2"}, "leave out `participation`"),
    ],
)
def test_what_silos_cannot_do_is_refused(fields, words):
    with pytest.raises(InputError, match=words):
        silo(0, **fields)
    with pytest.raises(InputError, match=words):
        server(**fields)


def test_records_of_another_number_than_the_plans_are_refused():
    with pytest.raises(InputError, match="client 0 has 16 records, and the plan is for 21"):
        Silo(
            *small.model(),
            losses.classification,
            small.config(),
            client=0,
            records=shards()[0],
            sizes=[21, 28, 12],
        )


def test_a_workdir_of_another_plan_is_refused(tmp_path):
    with silo(0, tmp_path / "silo") as party:
        party.fit(server().adapter, 1)
    with pytest.raises(InputError, match="begun with another plan"):
        silo(0, tmp_path / "silo", clip_norm=2.0)
    with pytest.raises(InputError, match="was not written by this run"):  # by a seed, another client has another secret
        silo(1, tmp_path / "silo")


def test_other_records_than_those_that_were_charged_are_refused(tmp_path):
    with silo(0, tmp_path / "silo") as party:
        party.fit(party.template, 1)
    with pytest.raises(InputError, match="the records are not those"):
        silo(0, tmp_path / "silo", records=shards()[1])
