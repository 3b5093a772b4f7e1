"""The ledger survives a crash at any byte: what was promised is durable, and what was not is cut off."""

import json
import os

import pytest

from dplora_jax.privacy import chain
from dplora_jax.privacy.ledger import Ledger
from tests.privacy.ledgers import DELTA, begin, expected


@pytest.fixture
def path(tmp_path):
    return tmp_path / "privacy_ledger.jsonl"


def test_an_entry_is_durable_before_it_is_promised_and_promised_durably_before_append_returns(path, monkeypatch):
    """Each append syncs the file with the whole line in it, the head file's draft, and after replacing it the directory."""
    synced, real = [], os.fsync
    draft = path.with_suffix(".head").with_name("privacy_ledger.head.draft")

    def fsync(handle):
        known = {p.stat().st_ino: p for p in (path, draft) if p.exists()}
        at = known.get(os.fstat(handle).st_ino)
        heads = path.with_suffix(".head").read_text() if path.with_suffix(".head").exists() else None
        synced.append((at and at.read_text(), heads) if at else (os.fstat(handle).st_ino, heads))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    ledger = Ledger(path)
    for append in (
        lambda: begin(ledger, (1, 4)),
        lambda: ledger.commit((1, 4), 0),
        lambda: ledger.append(entry="end"),
    ):
        old = path.with_suffix(".head").read_text() if path.with_suffix(".head").exists() else None
        append()
        new = json.dumps(ledger.anchor) + "\n"
        assert synced == [(path.read_text(), old), (new, old), (path.parent.stat().st_ino, new)]
        assert path.read_text().endswith("\n")
        synced.clear()


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


def torn_by_a_crash(path, rest):
    """A ledger with a begin and a commit, both promised, and `rest` of an entry that was not -> (kept bytes, the whole line)."""
    ledger = Ledger(path)
    begin(ledger, (1, 4))
    ledger.commit((1, 4), 0)
    kept, head = path.read_bytes(), path.with_suffix(".head").read_bytes()
    begin(ledger, (4, 6))
    line = path.read_bytes()[len(kept) :]
    path.write_bytes(kept + rest(line))
    path.with_suffix(".head").write_bytes(head)
    return kept, line


def test_a_line_torn_at_any_byte_is_cut_off_and_nothing_else_is_lost(path):
    kept, line = torn_by_a_crash(path, lambda line: b"")
    for length in range(len(line)):
        path.write_bytes(kept + line[:length])
        assert Ledger(path, mend=False).torn == (length > 0)
        assert path.read_bytes() == kept + line[:length], "a reader wrote"
        repaired = Ledger(path)
        assert path.read_bytes() == kept
        assert [entry["entry"] for entry in repaired.entries] == ["begin", "commit"]
    begin(repaired, (4, 6))
    assert path.read_bytes() == kept + line
    assert Ledger(path).epsilons(DELTA) == expected(5)


@pytest.mark.parametrize(
    "rest",
    [lambda _: bytes(100), lambda _: bytes(99) + b"\n", lambda line: bytes(40) + line[40:], lambda _: b"\xff\r\n"],
    ids=["zeros", "zeros and a newline", "a first block of zeros", "other bytes"],
)
def test_what_a_power_cut_leaves_of_an_unpromised_line_is_cut_off(path, rest):
    kept, _ = torn_by_a_crash(path, rest)
    assert Ledger(path).charged_rounds() == 3
    assert path.read_bytes() == kept


def test_a_whole_line_whose_promise_a_crash_forestalled_counts_and_is_promised_when_the_run_goes_on(path):
    torn_by_a_crash(path, lambda line: line)
    for _ in range(2):  # a second crash at the same place
        ledger = Ledger(path)
        assert ledger.open_entry()["rounds"] == [4, 6]
    ledger.promise()
    assert json.loads(path.with_suffix(".head").read_text()) == ledger.anchor


def test_a_second_crash_before_a_promise_leaves_no_more_than_one_line_unpromised(path, monkeypatch):
    torn_by_a_crash(path, lambda line: line)
    ledger, real, promises = Ledger(path), chain.replace_durably, []

    def crash_at_the_second(*arguments):
        promises.append(arguments)
        if len(promises) == 2:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(chain, "replace_durably", crash_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        ledger.commit((4, 6), 0)
    assert Ledger(path).open_entry() is None
