"""The ledger charges before it lets anything run, survives a crash at any byte, and keeps every charge once."""

import json
import os

import pytest

from dplora_jax.errors import InputError
from dplora_jax.privacy import accounting
from dplora_jax.privacy.accounting import Mechanism
from dplora_jax.privacy.ledger import Ledger

DELTA = 1e-5
MECHANISMS = [Mechanism(100, 0.2, 35, 1.1), Mechanism(50, 0.4, 50, 1.3)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "privacy_ledger.jsonl"


def begin(ledger, rounds, attempt=0, local_steps=2, fingerprint="f0"):
    ledger.begin(rounds, attempt, MECHANISMS, local_steps, fingerprint)


def expected(rounds):
    return [accounting.epsilon(m, rounds * 2, DELTA) for m in MECHANISMS]


def test_a_new_ledger_is_empty_and_costs_nothing(path):
    ledger = Ledger(path)
    assert not path.exists()
    assert (ledger.entries, ledger.open_entry(), ledger.charged_rounds(), ledger.ended) == ([], None, 0, False)
    assert ledger.epsilons(DELTA) == []
    assert ledger.next_attempt((1, 9)) == 0


def test_epsilons_are_recomputed_from_the_entries_and_equal_the_accountants(path):
    ledger = Ledger(path)
    for rounds in (1, 4), (4, 9):
        begin(ledger, rounds)
        ledger.commit(rounds, 0)
    for read in ledger, Ledger(path):
        assert read.charged_rounds() == 8
        assert read.epsilons(DELTA) == expected(8)


def test_other_noise_later_on_is_composed_with_the_first(path):
    ledger = Ledger(path)
    begin(ledger, (1, 4))
    other = Mechanism(100, 0.2, 35, 2.0)
    ledger.begin((4, 6), 0, [other, MECHANISMS[1]], 2, "f0")
    first, second = ledger.epsilons(DELTA)
    assert first == accounting.composed(((MECHANISMS[0], 6), (other, 4)), DELTA)
    assert second == expected(5)[1]


def test_an_entry_is_open_from_begin_to_commit(path):
    ledger = Ledger(path)
    begin(ledger, (1, 4), fingerprint="abc")
    entry = Ledger(path).open_entry()
    assert (entry["rounds"], entry["attempt"], entry["fingerprint"], entry["local_steps"]) == ([1, 4], 0, "abc", 2)
    assert entry["clients"] == [[100, 0.2, 35, 1.1, 0.0, 1], [50, 0.4, 50, 1.3, 0.0, 1]]
    ledger.commit((1, 4), 0)
    assert Ledger(path).open_entry() is None
    begin(ledger, (4, 5))
    assert ledger.open_entry()["rounds"] == [4, 5]
    assert not ledger.ended
    ledger.append(entry="end", round=4)
    assert Ledger(path).ended


def test_a_commit_of_another_attempt_or_of_other_rounds_closes_nothing(path):
    ledger = Ledger(path)
    begin(ledger, (1, 4))
    begin(ledger, (1, 4), attempt=1)
    ledger.commit((1, 4), 0)
    ledger.commit((1, 5), 1)
    assert ledger.open_entry()["attempt"] == 1


def test_a_replay_is_charged_once_and_a_new_attempt_again(path):
    begin(Ledger(path), (1, 4))
    replay = Ledger(path)  # after a crash: the open entry is run under its own keys, with no second begin
    assert replay.open_entry()["attempt"] == 0
    assert replay.epsilons(DELTA) == expected(3)
    begin(replay, (1, 4), attempt=replay.next_attempt((1, 4)), fingerprint="f1")
    assert replay.open_entry()["attempt"] == 1
    assert replay.charged_rounds() == 6
    assert replay.epsilons(DELTA) == expected(6)
    assert all(twice > once for twice, once in zip(expected(6), expected(3), strict=True))


@pytest.mark.parametrize(("rounds", "attempt"), [((4, 6), 3), ((5, 6), 3), ((1, 2), 1), ((2, 5), 3), ((6, 9), 0)])
def test_the_next_attempt_has_keys_that_none_of_its_rounds_has_used(path, rounds, attempt):
    """Any overlap counts, however the dispatches are cut, and whether or not they were committed."""
    ledger = Ledger(path)
    begin(ledger, (1, 4))
    ledger.commit((1, 4), 0)
    begin(ledger, (4, 6), attempt=2)
    assert ledger.next_attempt(rounds) == attempt


def test_begin_is_durable_before_it_returns(path, monkeypatch):
    """At the moment of the file's fsync the whole line is in it; a new file's directory is synced as well."""
    synced, real = [], os.fsync

    def fsync(handle):
        is_file = os.fstat(handle).st_ino == path.stat().st_ino
        synced.append(path.read_text() if is_file else os.fstat(handle).st_ino)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    ledger = Ledger(path)
    begin(ledger, (1, 4))
    first = path.read_text()
    assert first.endswith("\n")
    assert synced == [first, path.parent.stat().st_ino]
    for append in (lambda: ledger.commit((1, 4), 0), lambda: begin(ledger, (4, 5)), lambda: ledger.append(entry="end")):
        append()
        assert synced[-1] == path.read_text()
    assert len(synced) == 5


@pytest.mark.parametrize("sync_fails_on", ["begin", "commit"])
def test_a_failed_fsync_is_an_error_and_not_a_promise(path, monkeypatch, sync_fails_on):
    ledger = Ledger(path)
    if sync_fails_on == "commit":
        begin(ledger, (1, 4))

    def full_disk(handle):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        begin(ledger, (1, 4)) if sync_fails_on == "begin" else ledger.commit((1, 4), 0)


def test_a_line_torn_at_any_byte_is_cut_off_and_nothing_else_is_lost(path):
    ledger = Ledger(path)
    begin(ledger, (1, 4))
    ledger.commit((1, 4), 0)
    kept = path.read_bytes()
    begin(ledger, (4, 6))
    whole = path.read_bytes()
    for length in range(len(kept), len(whole)):
        path.write_bytes(whole[:length])
        repaired = Ledger(path)
        assert path.read_bytes() == kept
        assert [entry["entry"] for entry in repaired.entries] == ["begin", "commit"]
    begin(repaired, (4, 6))
    assert path.read_bytes() == whole
    assert Ledger(path).epsilons(DELTA) == expected(5)


def test_blocks_of_zeros_after_a_power_cut_are_cut_off(path):
    begin(Ledger(path), (1, 4))
    kept = path.read_bytes()
    path.write_bytes(kept + bytes(100))
    assert Ledger(path).charged_rounds() == 3
    assert path.read_bytes() == kept


@pytest.mark.parametrize(
    "damage", [b'{"entry": "begin", "rou', b"\xff\xfe\x00", b"3", b"[]", b'{"rounds": [1, 4]}', b""]
)
def test_a_damaged_line_before_the_last_is_refused_and_left_alone(path, damage):
    ledger = Ledger(path)
    begin(ledger, (1, 4))
    begin(ledger, (4, 6))
    first, second, _ = path.read_bytes().split(b"\n")
    damaged = b"\n".join([first, damage, second, b""])
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="damaged"):
        Ledger(path)
    assert path.read_bytes() == damaged


def test_each_entry_is_one_line_of_json(path):
    ledger = Ledger(path)
    begin(ledger, (1, 4))
    ledger.append(entry="end", round=3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == ledger.entries
