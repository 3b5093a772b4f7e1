"""The main job stopped and started again: killed, by SIGTERM, with a dispatch lost, with a ledger or records that changed."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dplora_jax.federation import dispatch
from dplora_jax.federation.federation import Federation
from dplora_jax.privacy.ledger import Ledger
from experiments import ledger, run
from tests.experiments.small_runs import adapter_of, arguments, crash_before, fit, lines_of

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def command(tiny_bert, finance_table, tmp_path):
    return arguments(tiny_bert, finance_table, tmp_path)


def start(arguments):
    """The command as a process of its own, which compiles as this one does."""
    compiled = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *arguments],
        env=os.environ | compiled | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_rounds(folder, rounds, process):
    """Return once the metrics of that many rounds are released."""
    until = time.time() + 120
    while time.time() < until and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len(lines_of(folder / "metrics.jsonl")) > rounds:
            return
        time.sleep(0.02)
    raise AssertionError(f"no round {rounds}: {process.communicate()}")


@pytest.mark.slow
def test_a_run_that_is_killed_and_then_terminated_comes_to_the_same_bits(command, tmp_path):
    """SIGTERM saves the dispatch under way and exits with 75; the third start is the object's own."""
    longer = [*command, "--seed=5", "--rounds=30", "--dispatch_rounds=1", "--mesh=1x1"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    fit([*longer, f"--workdir={whole}"])
    longer = [*longer, f"--workdir={folder}"]
    process = start(longer)
    wait_for_rounds(folder, 3, process)
    process.kill()
    process.communicate()
    process = start(longer)
    wait_for_rounds(folder, 11, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, process.communicate()
    kept = Ledger(folder / "privacy_ledger.jsonl")
    assert kept.open_entry() is None
    assert 11 <= kept.charged_rounds() == len(lines_of(folder / "metrics.jsonl")) - 1 < 30
    fit(longer)
    expected, found = adapter_of(whole), adapter_of(folder)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert [line["round"] for line in lines_of(folder / "metrics.jsonl")] == list(range(31))
    assert Ledger(folder / "privacy_ledger.jsonl").charged_rounds() == 30


def test_sigterm_saves_the_dispatch_under_way_and_the_next_start_goes_on(command, tmp_path, monkeypatch):
    commit, folder = dispatch.commit, tmp_path / "run"

    def terminated(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        commit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "commit", terminated)
        assert run.main(command) == 75
    kept = Ledger(folder / "privacy_ledger.jsonl")
    assert kept.open_entry() is None
    assert kept.charged_rounds() == len(lines_of(folder / "metrics.jsonl")) - 1 == 2
    assert run.main(command) == 0
    assert [line["round"] for line in lines_of(folder / "metrics.jsonl")] == list(range(7))
    assert Ledger(folder / "privacy_ledger.jsonl").charged_rounds() == 6


def test_a_lost_dispatch_draws_new_keys_pays_for_both_and_ends_within_budget(command, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        crash_before(patch, dispatch, "commit")
        with pytest.raises(KeyboardInterrupt):
            fit(command)
    assert run.main(command) == 0
    kept = Ledger(tmp_path / "run" / "privacy_ledger.jsonl")
    assert [(entry["rounds"], entry["attempt"]) for entry in kept.begun] == [([1, 3], 0), ([1, 3], 1), ([3, 5], 0)]
    assert max(kept.epsilons(1e-3)) <= 8
    said = capsys.readouterr()
    assert "rounds 5 to 6 were not run" in said.out
    assert "warning: rounds 1 to 2 were lost: they stay paid for, and new noise is drawn." in said.err
    assert ledger.main(["show", str(tmp_path / "run")]) == 0
    last = lines_of(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["round"] == 4
    assert last["epsilon_max"] == pytest.approx(max(kept.epsilons(1e-3)))


def test_a_last_dispatch_that_was_lost_is_charged_in_the_final_figures(command, tmp_path, monkeypatch):
    commit, calls = dispatch.commit, []

    def crash_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        commit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "commit", crash_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            fit(command)
    fit(command)
    spent = Ledger(tmp_path / "run" / "privacy_ledger.jsonl").epsilons(1e-3)
    last = lines_of(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["round"] == 4
    assert "accuracy" in last
    assert last["epsilon"] == pytest.approx(spent)
    assert max(spent) > 7.9


def test_a_ledger_that_does_not_hold_stops_a_resume_and_one_that_is_gone_means_new_secrets(
    command, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        crash_before(patch, Federation, "_finish")
        with pytest.raises(KeyboardInterrupt):
            fit(command)
    path, head, private = folder / "privacy_ledger.jsonl", folder / "privacy_ledger.head", folder / "private"
    kept = {file: file.read_bytes() for file in (path, head, private / "secrets.json")}
    lines = kept[path].splitlines(keepends=True)

    def refused(words):
        capsys.readouterr()
        assert run.main(command) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1

    Ledger(path).append(entry="end", round=4)
    refused("seal does not fit")
    assert (private / "secrets.json").read_bytes() == kept[private / "secrets.json"], "a forged end cost the secrets"
    for file, content in kept.items():
        file.write_bytes(content)
    path.write_bytes(b"".join(lines[:-1]))
    refused("its end was removed")
    path.unlink()
    head.unlink()
    refused("checkpoint 4 knows of 3, so its end was removed")
    forged = Ledger(path)
    for line in lines:
        entry = json.loads(line)
        forged.append(**{name: value for name, value in entry.items() if name not in ("previous", "seal")})
    refused("checkpoint 4 knows, so it was edited")
    shutil.rmtree(folder / "checkpoints")
    refused("seal does not fit")
    path.unlink()
    head.unlink()  # nothing is left that tells what ran under the secrets
    fit(command)
    assert lines_of(path)[0]["inputs"] != json.loads(lines[0])["inputs"], "old secrets were used again"


def test_evaluation_asked_for_after_the_last_round_is_done(command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        crash_before(patch, Federation, "_finish")
        with pytest.raises(KeyboardInterrupt):
            fit([*command, "--eval_every=0", "--dispatch_rounds=2"])
    fit([*command, "--dispatch_rounds=2"])
    assert 0 <= lines_of(tmp_path / "run" / "metrics.jsonl")[-1]["accuracy"] <= 1


def test_records_that_changed_since_the_start_are_refused(command, finance_table, tmp_path, capsys, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.csv", "test.csv"):
        (data / name).write_text((finance_table / name).read_text())
    own = [*command, f"--data_dir={data}"]
    with monkeypatch.context() as patch:
        crash_before(patch, Federation, "_finish")
        with pytest.raises(KeyboardInterrupt):
            fit([*own, "--eval_every=0", "--dispatch_rounds=2"])
    rows = (data / "train.csv").read_text()
    (data / "train.csv").write_text(rows + "profit rose again,good,north\n")
    assert run.main(own) == 2
    assert "began with" in capsys.readouterr().err
    (data / "train.csv").write_text(rows.replace("profit", "sales", 1))
    assert run.main(own) == 2
    assert "not those" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_killed_at_every_boundary_lose_no_round_and_pay_for_none_twice():
    """From begin to commit and at the end, with torn lines, by SIGKILL; the adapter is the uninterrupted run's bit for bit."""
    command = [sys.executable, "-m", "tests.experiments.kill_stress", "--boundaries"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("9 kills: no round lost")
