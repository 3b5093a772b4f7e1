"""Scores on private records in several real processes, each of which keeps back and scores its own clients' records alone."""

import pytest

from experiments import ledger
from tests.experiments import several

pytestmark = pytest.mark.slow
MORE = ("--private_test=0.3", "--private_test_epsilon=8", "--seed=1", "--eval_every=2")


@pytest.fixture(scope="module")
def starts(tiny_bert, finance_table, tmp_path_factory):
    server = several.Starts(several.flags(tiny_bert, finance_table, 3), tmp_path_factory.mktemp("runs"))
    yield server
    server.close()


def scores(workdir):
    return [
        {name: value for name, value in line.items() if name.startswith("private_")}
        for line in several.lines_of(workdir / "metrics.jsonl")
    ]


def test_two_processes_release_what_one_releases(starts):
    """The same records kept back, the same noise, charged once."""
    alone, two = starts.run("alone", 1, 4, *MORE), starts.run("two", 2, 2, *MORE)
    assert [bool(line) for line in scores(alone)] == [True, False, True, True]
    assert scores(alone) == scores(two)
    for workdir in (alone, two):
        kept = ledger.verify(workdir).ledger
        assert [entry["round"] for entry in kept.evaluated] == [0, 2, 3]


def test_two_processes_without_a_seed_agree_on_who_is_kept_back(starts):
    """By the secrets that process 0 leaves for the others; the ledger of all records holds."""
    workdir = starts.run("unseeded", 2, 2, *(word for word in MORE if word != "--seed=1"))
    assert len(ledger.verify(workdir).ledger.evaluated) == 3
