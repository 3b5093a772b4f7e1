"""One end for all processes of a run, whichever of them dies, hangs or makes a mistake, and wherever; the next start goes on."""

import os
import re
import signal
import socket

import pytest

from dplora_jax.federation import supervisor
from experiments import ledger
from tests.experiments import several

pytestmark = pytest.mark.slow
ROUNDS = 3
# Where it happens; what is struck is the whole process, as when its host dies, or its worker alone.
PLACES = {"reading the base": "process", "rounds 2 to 2": "worker", "the checkpoint of round 2": "process"}


@pytest.fixture(scope="module")
def starts(tiny_bert, finance_table, tmp_path_factory):
    server = several.Starts(several.flags(tiny_bert, finance_table, ROUNDS), tmp_path_factory.mktemp("runs"))
    yield server
    server.close()


def said(starts, name, index):
    """The last line of process `index`."""
    return starts.log(name, index).read_text().splitlines()[-1]


def goes_on(starts, name, *then):
    """The next start, of (processes, devices), keeps the rounds that were committed; one that was lost stays paid for."""
    kept = several.lines_of(starts.folder / name / "metrics.jsonl")
    workdir = starts.run(name, *then)
    lines = several.lines_of(workdir / "metrics.jsonl")
    assert [line["round"] for line in lines] == list(range(ROUNDS + 1))
    assert lines[: len(kept)] == kept
    begun = [e for e in several.lines_of(workdir / "privacy_ledger.jsonl") if e["entry"] == "begin"]
    assert len(begun) - ROUNDS in (0, 1)
    assert ledger.main(["verify", str(workdir)]) == 0


@pytest.mark.parametrize(
    ("victim", "place", "blow"),
    [
        (0, "reading the base", "KILL"),
        (1, "reading the base", "STOP"),
        (0, "rounds 2 to 2", "STOP"),
        (1, "rounds 2 to 2", "KILL"),
        (0, "the checkpoint of round 2", "KILL"),
        (1, "the checkpoint of round 2", "STOP"),
    ],
)
def test_one_that_dies_or_hangs_ends_all_by_its_name(starts, victim, place, blow):
    name, target = f"{blow}{victim}{place.replace(' ', '_')}", PLACES[place]
    ids = starts.begin(name, 2, 2, blows={victim: (place, f"{blow} {target}")})
    assert starts.codes([ids[1 - victim]]) == [supervisor.LOST]
    sentence = said(starts, name, 1 - victim)
    named = rf"process {victim} \([^)]*\)"
    if (blow, target) == ("KILL", "worker"):
        assert re.match(rf"error: {named} was killed by SIGKILL at rounds 2 to 2\.", sentence)
    else:
        assert re.match(rf"error: no sign of life for \d+ s from {named}, last at [^,]*: it died", sentence)
    if target == "worker":  # whose supervisor says the same
        assert starts.codes([ids[victim]]) == [supervisor.LOST]
        assert said(starts, name, victim) == sentence
    else:
        os.kill(ids[victim], signal.SIGKILL)
    if blow == "KILL" and place != "reading the base":
        goes_on(starts, name, *((1, 4) if victim else (2, 2)))


@pytest.mark.parametrize(
    ("victim", "what", "place", "code", "words"),
    [
        (0, "mistake", "reading the base", 2, "--rank=7 is wrong."),
        (1, "mistake", "rounds 2 to 2", 2, "--rank=7 is wrong."),
        (0, "mistake", "the checkpoint of round 2", 2, "--rank=7 is wrong."),
        (1, "endless", "rounds 2 to 2", 65, "no number is finite any more."),
        (1, "broken", "the checkpoint of round 2", 74, "records.csv cannot be read or written"),
        (0, "fault", "rounds 2 to 2", 1, "failed with KeyError: see what it printed."),
        (1, "fault", "rounds 2 to 2", 1, "failed with KeyError: see what it printed."),
    ],
)
def test_a_failure_of_one_ends_all_with_its_sentence_and_code(starts, victim, what, place, code, words):
    name = f"{what}{victim}{place.replace(' ', '_')}"
    ids = starts.begin(name, 2, 2, blows={victim: (place, what)})
    assert starts.codes(ids) == [code, code]
    sentences = {said(starts, name, index) for index in range(2)}
    assert len(sentences) == 1
    assert re.match(rf"error: process {victim} \([^)]*\):? {re.escape(words)}", sentences.pop())
    assert "Marker" not in starts.log(name, victim).read_text()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_full_disk_at_one_ends_all_with_74_and_the_next_start_goes_on(starts, victim):
    name = f"full{victim}"
    ids = starts.begin(name, 2, 2, blows={victim: ("the checkpoint of round 2", "full")})
    assert starts.codes(ids) == [74, 74]
    for index in range(2):
        assert "cannot be read or written (File too large)" in said(starts, name, index)
    goes_on(starts, name, 2, 2)


def test_one_that_never_comes_ends_the_others_start(starts):
    with socket.create_server(("127.0.0.1", 0)) as free:
        where = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    for index in range(2):
        flags = [
            where,
            "--processes=2",
            f"--process={index}",
            "--stall_timeout=10",
            f"--workdir={starts.folder}/lonely",
        ]
        pid = starts.start([*starts.flags, *flags], 1, starts.folder, starts.log("lonely", index))
        assert starts.codes([pid]) == [supervisor.LOST]
        assert "start all 2 processes" in said(starts, "lonely", index)
