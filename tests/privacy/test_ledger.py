"""The ledger charges before it lets anything run, and keeps every charge once; what is edited, moved or removed is seen."""

import json

import pytest

from dplora_jax import json_files
from dplora_jax.errors import InputError
from dplora_jax.privacy import accounting, chain
from dplora_jax.privacy import ledger as ledger_module
from dplora_jax.privacy.accounting import Mechanism
from dplora_jax.privacy.ledger import Ledger
from tests.privacy.ledgers import DELTA, MECHANISMS, begin, expected


@pytest.fixture
def path(tmp_path):
    return tmp_path / "privacy_ledger.jsonl"


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
    ledger.begin((4, 6), 0, [other, MECHANISMS[1]], 2, {"data": "f0"})
    first, second = ledger.epsilons(DELTA)
    assert first == accounting.composed(((MECHANISMS[0], 6), (other, 4)), DELTA)
    assert second == expected(5)[1]


def test_an_entry_is_open_from_begin_to_commit(path):
    ledger = Ledger(path)
    begin(ledger, (1, 4), data="abc")
    entry = Ledger(path).open_entry()
    assert (entry["rounds"], entry["attempt"], entry["inputs"], entry["local_steps"]) == ([1, 4], 0, {"data": "abc"}, 2)
    assert entry["clients"][0] == {
        "kind": "truncated_poisson_gaussian", "records": 100, "sampling_rate": 0.2, "capacity": 35, "noise_multiplier": 1.1,
        "count_noise": 0.0, "bands": 1,
    }  # fmt: skip
    ledger.commit((1, 4), 0)
    assert Ledger(path).open_entry() is None
    begin(ledger, (4, 5))
    assert ledger.open_entry()["rounds"] == [4, 5]
    assert not ledger.ended
    ledger.append(entry="end", round=4)
    assert Ledger(path).ended


def test_a_commit_of_another_attempt_closes_nothing(path):
    ledger = Ledger(path)
    begin(ledger, (1, 4))
    begin(ledger, (1, 4), attempt=1)
    ledger.commit((1, 4), 0)
    assert ledger.open_entry()["attempt"] == 1


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (lambda ledger: begin(ledger, (3, 6)), "keys an earlier entry used"),
        (lambda ledger: ledger.commit((1, 5), 0), "commits what was not begun"),
        (lambda ledger: (ledger.append(entry="end"), begin(ledger, (4, 5))), "after the end"),
        (lambda ledger: ledger.append(entry="begin", rounds=[4, 5]), "line 2 is not an entry"),
        (lambda ledger: ledger.append(entry="gift"), "line 2 is not an entry"),
    ],
)
def test_a_chain_of_entries_that_cannot_be_is_refused(path, last, words):
    ledger = Ledger(path)
    begin(ledger, (1, 4))
    last(ledger)
    with pytest.raises(InputError, match=words):
        Ledger(path)


def test_a_mechanism_of_a_kind_that_is_not_known_is_refused(path):
    with pytest.raises(InputError, match="does not know"):
        ledger_module.rebuild({"kind": "magic"})
    assert [ledger_module.rebuild(ledger_module.describe(m)) for m in MECHANISMS] == MECHANISMS


def test_a_lost_attempt_stays_charged_and_a_new_one_is_charged_again(path):
    begin(Ledger(path), (1, 4))
    again = Ledger(path)  # after a crash
    assert again.open_entry()["attempt"] == 0
    assert again.epsilons(DELTA) == expected(3)
    begin(again, (1, 4), attempt=again.next_attempt((1, 4)))
    assert again.open_entry()["attempt"] == 1
    assert again.charged_rounds() == 6
    assert again.epsilons(DELTA) == expected(6)
    assert all(twice > once for twice, once in zip(expected(6), expected(3), strict=True))


@pytest.mark.parametrize(("rounds", "attempt"), [((4, 6), 3), ((5, 6), 3), ((1, 2), 1), ((2, 5), 3), ((6, 9), 0)])
def test_the_next_attempt_has_keys_that_none_of_its_rounds_has_used(path, rounds, attempt):
    """Any overlap counts, however the dispatches are cut, and whether or not they were committed."""
    ledger = Ledger(path)
    begin(ledger, (1, 4))
    ledger.commit((1, 4), 0)
    begin(ledger, (4, 6), attempt=2)
    assert ledger.next_attempt(rounds) == attempt


def three(path, secret=None):
    """A ledger of three dispatches, the last one open -> the ledger."""
    ledger = Ledger(path)
    if secret:
        ledger.seal_with(secret)
    for rounds in (1, 4), (4, 6):
        begin(ledger, rounds)
        ledger.commit(rounds, 0)
    begin(ledger, (6, 7))
    return ledger


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("change", ["edited", "deleted", "moved", "doubled", "blanked"])
def test_no_entry_can_be_changed_unseen_the_last_one_included(path, number, change):
    three(path)
    lines = path.read_bytes().splitlines(keepends=True)
    if change == "edited":
        lines[number] = lines[number].replace(b'"rounds": [', b'"rounds": [1')
    elif change == "blanked":
        lines[number] = b"\n"
    elif change == "deleted":
        del lines[number]
    elif change == "doubled":
        lines.insert(number, lines[number])
    else:
        lines[number], lines[number - 1] = lines[number - 1], lines[number]
    changed = b"".join(lines)
    path.write_bytes(changed)
    with pytest.raises(InputError, match=r"privacy_ledger\.jsonl (does not hold|is damaged|has 6 entries)"):
        Ledger(path)
    assert path.read_bytes() == changed


def test_a_promised_last_line_that_lost_its_newline_is_not_taken_for_a_torn_one(path):
    three(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="its end was removed"):
        Ledger(path)


def test_a_head_file_that_is_gone_old_or_damaged_is_an_error(path):
    ledger = three(path)
    head = path.with_suffix(".head")
    for text, words in [
        ("{", "damaged"), ('{"entries": true, "head": "0"}', "damaged"),
        ('{"entries": -1, "head": "0"}', "damaged"), ('{"entries": 5, "head": "0"}', "was edited"),
        (json.dumps({"entries": 3, "head": ledger.heads[3]}), "gone or old"),
    ]:  # fmt: skip
        head.write_text(text)
        with pytest.raises(InputError, match=words):
            Ledger(path)
    head.unlink()
    with pytest.raises(InputError, match="gone or old"):
        Ledger(path)


def test_an_anchor_kept_elsewhere_shows_a_removed_end_and_a_rewritten_entry(path, tmp_path):
    ledger = three(path)
    for count in range(6):
        ledger.check({"entries": count, "head": ledger.heads[count]}, "checkpoint 3")
    other = Ledger(tmp_path / "other.jsonl")
    begin(other, (1, 2))
    for shorter in (other, Ledger(tmp_path / "none.jsonl")):
        with pytest.raises(InputError, match="checkpoint 3 knows of 5, so its end was removed"):
            shorter.check(ledger.anchor, "checkpoint 3")
    for count in ("5", -1, None, True):
        with pytest.raises(InputError, match="checkpoint 3 is damaged"):
            ledger.check({"entries": count, "head": ledger.heads[-1]}, "checkpoint 3")
    with pytest.raises(InputError, match="entry 1 is not the one that checkpoint 3 knows"):
        other.check({"entries": 1, "head": ledger.heads[1]}, "checkpoint 3")


def test_a_chain_rewritten_whole_and_consistently_lacks_the_runs_seal(path):
    """Whoever rewrites the file, its hashes and its head file passes for the run's own, but not while the secret exists."""
    secret = b"s" * 32
    kept = [dict(entry) for entry in three(path, secret).entries]
    Ledger(path).seal_with(secret)
    path.unlink()
    path.with_suffix(".head").unlink()
    forged = Ledger(path)
    for entry in kept[:-1]:
        forged.append(**{name: value for name, value in entry.items() if name != "previous"})
    assert [entry.get("seal") for entry in forged.entries] == [entry["seal"] for entry in kept[:-1]]
    with pytest.raises(InputError, match=r"privacy_ledger\.head was not written by this run"):
        Ledger(path).seal_with(secret)
    forged.append(entry="end")
    with pytest.raises(InputError, match=r"entry 5 of .* was not written by this run"):
        Ledger(path).seal_with(secret)
    with pytest.raises(InputError, match=r"entry 1 of .* was not written by this run"):
        Ledger(path).seal_with(b"t" * 32)


@pytest.mark.parametrize("seal", ["\u00e9", "\ud800", 5])
def test_a_seal_of_any_text_is_refused_in_words(path, seal):
    three(path, b"s" * 32)
    head = path.with_suffix(".head")
    head.write_text(json.dumps(json.loads(head.read_text()) | {"seal": seal}))
    with pytest.raises(InputError, match="was not written by this run"):
        Ledger(path).seal_with(b"s" * 32)


def test_each_entry_is_one_line_of_json(path):
    ledger = Ledger(path)
    begin(ledger, (1, 4))
    ledger.append(entry="end", round=3)
    assert [json.loads(line) for line in path.read_text().splitlines()] == ledger.entries


def test_a_ledger_is_never_written_longer_than_it_is_read(path, monkeypatch):
    ledger = three(path)
    for module, name in ((chain, "MOST_ENTRIES"), (json_files, "MOST_BYTES"), (json_files, "MOST_TEXT")):
        with monkeypatch.context() as patch:
            patch.setattr(
                module, name, {"MOST_ENTRIES": 5, "MOST_BYTES": path.stat().st_size + 9, "MOST_TEXT": 9}[name]
            )
            with pytest.raises(InputError, match="would outgrow"):
                ledger.append(entry="end")
    ledger.append(entry="end")
    assert Ledger(path).ended
