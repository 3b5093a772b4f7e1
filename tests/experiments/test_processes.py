"""Several real processes as one run, on loopback: the same adapters as one process, and a stop for all."""

import json
import os
import shutil
import signal
import socket
import time

import numpy as np
import pytest
import safetensors.numpy

from experiments import ledger
from tests.experiments import several

pytestmark = pytest.mark.slow
ROUNDS = 10


@pytest.fixture(scope="module")
def starts(tiny_bert, finance_table, tmp_path_factory):
    server = several.Starts(several.flags(tiny_bert, finance_table, ROUNDS), tmp_path_factory.mktemp("runs"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def alone(starts):
    """One process with four devices."""
    return starts.run("alone", 1, 4, "--seed=1")


@pytest.fixture(scope="module")
def two(starts):
    """Two processes with two devices each: the same mesh."""
    return starts.run("two", 2, 2, "--seed=1", "--private_diagnostics")


def adapter_of(workdir):
    return safetensors.numpy.load_file(workdir / "adapter" / "adapter_model.safetensors")


def differences(one, other):
    one, other = adapter_of(one), adapter_of(other)
    assert one.keys() == other.keys()
    assert all(np.abs(value).max() > 0 for value in one.values())
    return max(float(np.abs(value - other[name]).max()) for name, value in one.items())


def wait_for_round(starts, name, number, ids):
    """Return when `number` rounds are committed."""
    path, until = starts.folder / name / "metrics.jsonl", time.monotonic() + several.BOUND
    while not path.exists() or len(path.read_text().splitlines()) <= number:
        assert time.monotonic() < until, "\n".join(starts.log(name, i).read_text() for i in range(len(ids)))
        time.sleep(0.05)


def test_two_processes_make_what_one_makes(alone, two):
    assert differences(alone, two) < 1e-6
    for one, other in zip(
        several.lines_of(alone / "metrics.jsonl"), several.lines_of(two / "metrics.jsonl"), strict=True
    ):
        timeless = [
            {k: v for k, v in line.items() if k not in ("seconds", "examples_per_second")} for line in (one, other)
        ]
        assert timeless[0] == timeless[1]
    assert ledger.main(["verify", str(two)]) == 0


def test_what_clients_keep_and_who_takes_part_are_the_same_over_processes(starts):
    """Each client's own B (FedSA-LoRA), a schedule and drop-outs: every client's file, and the ledger."""
    more = ["--seed=1", "--aggregation=fedsa", "--participation=fixed:3", "--dropout=0.2"]
    one, two = (starts.run(f"kept{count}", count, 2 // count, *more) for count in (1, 2))
    for place in (".", *(f"clients/{k}" for k in range(4))):
        own = [safetensors.numpy.load_file(w / "adapter" / place / "adapter_model.safetensors") for w in (one, two)]
        assert all(np.abs(value - own[1][name]).max() < 1e-6 for name, value in own[0].items())
    assert ledger.main(["verify", str(two)]) == 0
    finished = [[line.get("finished") for line in several.lines_of(w / "metrics.jsonl")] for w in (one, two)]
    assert finished[0] == finished[1]
    assert max(finished[0][1:]) <= 3


def test_streamed_records_are_the_same_over_processes(starts, alone):
    """Each process sends its own clients' rows to its own devices."""
    streamed = starts.run("streamed", 2, 2, "--seed=1", "--stream")
    assert differences(alone, streamed) < 1e-6
    assert ledger.main(["verify", str(streamed)]) == 0


def test_two_processes_begin_where_one_does_after_public_records(starts, finance_table):
    path = starts.folder / "public.csv"
    path.write_text((finance_table / "test.csv").read_text())
    more = ["--seed=1", f"--public_data={path}", "--public_lr=0.02", "--client_lr=0.001", "--head_lr=0.001"]
    one, two = (starts.run(f"warm{count}", count, 2 // count, *more) for count in (1, 2))
    assert differences(one, two) < 1e-6
    assert ledger.main(["verify", str(two)]) == 0


def test_diagnostics_of_all_clients_come_from_all_processes(two):
    lines = several.lines_of(two / "private" / "diagnostics.jsonl")
    assert [line["round"] for line in lines] == list(range(1, ROUNDS + 1))
    assert all(np.shape(line["loss"])[0] == 4 and np.min(line["loss"]) > 0 for line in lines)


def test_four_processes_make_what_one_makes(starts, alone):
    four = starts.run("four", 4, 1, "--seed=1")
    assert differences(alone, four) < 1e-6
    assert ledger.main(["verify", str(four)]) == 0


@pytest.fixture(scope="module")
def tables(finance_table, starts):
    """Four clients' own tables in folders, and for each of two processes a folder where the other's clients' are empty."""
    header, *rows = (finance_table / "train.csv").read_text().splitlines()
    whole = starts.folder / "whole" / "tables"
    for index, name in enumerate(("alder", "birch", "cedar", "dogwood")):
        (whole / name).mkdir(parents=True)
        part = rows[index::4][: 15 - index]
        (whole / name / "train.csv").write_text("\n".join([header, *part]) + "\n")
    shutil.copy(finance_table / "test.csv", whole)
    parts = []
    for index, strange in enumerate((("cedar", "dogwood"), ("alder", "birch"))):
        parts.append(starts.folder / f"part{index}")
        shutil.copytree(whole, parts[-1] / "tables")
        for name in strange:
            (parts[-1] / "tables" / name / "train.csv").unlink()
    return whole.parent, parts


def test_a_process_needs_no_other_clients_folders(starts, tables):
    """Each of two has its own clients' tables alone, and what they make is what one process makes of all four."""
    whole, parts = tables
    flags = ["--partition=folders", "--data_dir=tables", "--seed=1"]
    one = starts.run("folders", 1, 4, *flags, folders=[whole])
    both = starts.run("parts", 2, 2, *flags, folders=parts)
    assert differences(one, both) < 1e-6
    records = [c["records"] for c in json.loads((both / "config.json").read_text())["federation"]["clients"]]
    assert records == [15, 14, 13, 12]


def test_a_mistake_at_one_process_ends_all_with_its_sentence(starts, tables):
    _, parts = tables
    ids = starts.begin("mistake", 2, 2, "--partition=folders", "--data_dir=tables", folders=[parts[1], parts[0]])
    assert starts.codes(ids) == [2, 2]
    for index in range(2):
        said = starts.log("mistake", index).read_text()
        assert "error: process " in said
        assert "has no train.csv" in said
        assert "Traceback" not in said


def test_sigterm_at_one_process_stops_all_and_loses_nothing(starts, two):
    ids = starts.begin("stopped", 2, 2, "--seed=1", "--private_diagnostics")
    wait_for_round(starts, "stopped", 2, ids)
    os.kill(ids[1], signal.SIGTERM)
    assert starts.codes(ids) == [75, 75]
    done = len(several.lines_of(starts.folder / "stopped" / "metrics.jsonl")) - 1
    assert done < ROUNDS
    assert differences(starts.run("stopped", 2, 2, "--seed=1", "--private_diagnostics"), two) == 0


def test_sigterm_before_a_round_stops_all_too(starts):
    ids, lock, until = starts.begin("early", 2, 2), starts.folder / "early" / ".lock", time.monotonic() + several.BOUND
    while not lock.exists():  # process 0 makes it when all have joined
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(ids[1], signal.SIGTERM)
    assert starts.codes(ids) == [75, 75]


def test_processes_with_different_flags_do_not_start(starts):
    with socket.create_server(("127.0.0.1", 0)) as free:
        where = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    flags = [*starts.flags, f"--workdir={starts.folder / 'unlike'}", where, "--processes=2"]
    ids = [
        starts.start([*flags, f"--process={i}", f"--rank={2 + i}"], 1, starts.folder, starts.log("unlike", i))
        for i in range(2)
    ]
    assert starts.codes(ids) == [2, 2]
    assert "started with different --rank:" in starts.log("unlike", 1).read_text()
