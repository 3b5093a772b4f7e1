"""The main job as a person runs it: its files, its end, its resumption after a kill, its refusals."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

import experiments.report
from dplora_jax import checkpoint
from dplora_jax.privacy import accounting
from dplora_jax.privacy.ledger import Ledger, rebuild
from experiments import dispatch, ledger, progress, run, setup

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def command(tiny_bert, finance_table, tmp_path):
    """The flags of a small run with every moving part, and a workdir of its own."""
    return [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=3", "--rounds=6", "--local_steps=2", "--expected_batch_size=8", "--rank=2",
        "--epsilon=8", "--delta=1e-3", "--client_lr=0.1", "--head_lr=1", "--server_momentum=0.5", "--ema=0.5",
        "--eval_every=2", f"--workdir={tmp_path / 'run'}",
    ]  # fmt: skip


def adapter_of(workdir):
    return safetensors.numpy.load_file(pathlib.Path(workdir) / "adapter" / "adapter_model.safetensors")


def lines_of(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def test_run_leaves_what_the_contract_names(command, tmp_path, capsys):
    assert run.main(command) == 0
    folder = tmp_path / "run"
    said = capsys.readouterr()
    assert said.err == ""
    assert "epsilon" in said.out
    assert str(folder / "adapter") in said.out
    lines = lines_of(folder / "metrics.jsonl")
    assert [line["round"] for line in lines] == list(range(7))
    assert [line["round"] for line in lines if "accuracy" in line] == [0, 2, 4, 6]
    assert all(len(line["epsilon"]) == 3 for line in lines)
    assert lines[-1]["epsilon_max"] <= 8
    assert lines[-1]["epsilon_max"] > 7.9
    config = json.loads((folder / "config.json").read_text())
    assert config["rank"] == 2
    assert config["epsilon"] == 8
    assert (folder / "report.html").exists()
    assert set(adapter_of(folder)) >= {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert stat.S_IMODE((folder / "private").stat().st_mode) == 0o700
    assert list((folder / "private").iterdir()) == [], "secrets outlived the run"
    assert [name for name, _ in checkpoint.anchors(folder / "checkpoints")] == ["checkpoint 4", "checkpoint 6"]
    assert ledger.main(["verify", str(folder)]) == 0
    report = (folder / "report.html").read_text()
    assert "Ledger: 3 dispatches begun, 3 committed; 6 rounds charged; the chain holds against" in report
    experiments.report.write(folder)
    assert (folder / "report.html").read_text() == report, "the entry that ends the run changed its report"


def test_epsilon_shown_is_the_ledgers_own(command, tmp_path):
    run.main(command)
    folder = tmp_path / "run"
    kept = Ledger(folder / "privacy_ledger.jsonl")
    assert lines_of(folder / "metrics.jsonl")[-1]["epsilon"] == pytest.approx(kept.epsilons(1e-3))
    mechanism = rebuild(kept.entries[0]["clients"][0])
    assert accounting.epsilon(mechanism, 12, 1e-3) == pytest.approx(kept.epsilons(1e-3)[0])


def test_finished_run_says_so_and_does_nothing(command, tmp_path, capsys):
    run.main(command)
    before = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "run").rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    capsys.readouterr()
    assert run.main(command) == 0
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_other_configuration_is_refused_by_name(command, capsys):
    run.main(command)
    assert run.main([*command, "--rank=3", "--delta=1e-4"]) == 2
    said = capsys.readouterr().err
    assert "--rank" in said
    assert "--delta" in said


def test_seed_repeats_the_run_and_marks_it(command, tmp_path, capsys):
    for name in ("first", "second"):
        run.main([*command, "--seed=3", f"--workdir={tmp_path / name}"])
    first, second = adapter_of(tmp_path / "first"), adapter_of(tmp_path / "second")
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert "NOT FOR RELEASE" in capsys.readouterr().out
    for name in ("report.html", "config.json", "metrics.jsonl", "privacy_ledger.jsonl", "adapter/README.md"):
        assert "NOT FOR RELEASE" in (tmp_path / "first" / name).read_text(), name
    run.main([*command, f"--workdir={tmp_path / 'third'}"])
    third = adapter_of(tmp_path / "third")
    assert not np.array_equal(first["base_model.model.classifier.weight"], third["base_model.model.classifier.weight"])


def test_frozen_layers_may_run_once_a_record_or_at_each_step(command, tmp_path):
    for name in ("cache_frozen", "nocache_frozen"):
        run.main([*command, "--seed=3", "--last_layers=1", f"--{name}", f"--workdir={tmp_path / name}"])
    once, each = adapter_of(tmp_path / "cache_frozen"), adapter_of(tmp_path / "nocache_frozen")
    assert all(np.allclose(once[name], each[name], atol=1e-5) for name in each)
    assert np.abs(each["base_model.model.classifier.weight"]).max() > 1e-2


def test_trust_none_says_so_and_costs_infinity(command, tmp_path, capsys):
    assert run.main([*command, "--epsilon=inf"]) == 0
    assert "NO PRIVACY" in capsys.readouterr().out
    assert lines_of(tmp_path / "run" / "metrics.jsonl")[-1]["epsilon_max"] == "inf"
    for name in ("metrics.jsonl", "privacy_ledger.jsonl", "adapter/README.md"):
        assert "NO PRIVACY" in (tmp_path / "run" / name).read_text(), name
    assert "no privacy" in (tmp_path / "run" / "report.html").read_text().lower()


def start(arguments):
    """The command as a process of its own, on one device."""
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *arguments],
        env=environment,
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


def test_killed_run_resumes_to_the_same_bits(command, tmp_path):
    longer = [*command, "--seed=5", "--rounds=40", "--dispatch_rounds=1"]
    whole = start([*longer, f"--workdir={tmp_path / 'whole'}"])
    assert whole.wait(300) == 0, whole.stderr.read()
    folder = tmp_path / "killed"
    for rounds in (3, 11):
        process = start([*longer, f"--workdir={folder}"])
        wait_for_rounds(folder, rounds, process)
        process.kill()
        process.communicate()
    assert not (folder / "adapter").exists(), "the run was over before it was killed"
    last = start([*longer, f"--workdir={folder}"])
    assert last.wait(300) == 0, last.stderr.read()
    expected, found = adapter_of(tmp_path / "whole"), adapter_of(folder)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert [line["round"] for line in lines_of(folder / "metrics.jsonl")] == list(range(41))
    assert Ledger(folder / "privacy_ledger.jsonl").charged_rounds() == 40


def test_sigterm_saves_and_exits_75(command, tmp_path):
    longer = [*command, "--rounds=200", "--dispatch_rounds=1"]
    folder = tmp_path / "run"
    process = start(longer)
    wait_for_rounds(folder, 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    kept = Ledger(folder / "privacy_ledger.jsonl")
    assert kept.open_entry() is None
    assert len(lines_of(folder / "metrics.jsonl")) == kept.charged_rounds() + 1


def crash_before(monkeypatch, module, name):
    """Make the first call of `module.<name>` end the run as a crash would."""

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, crash)


def test_dispatch_lost_before_its_checkpoint_is_replayed_and_paid_once(command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        crash_before(patch, dispatch, "commit")
        with pytest.raises(KeyboardInterrupt):
            run.main(command)
    path = tmp_path / "run" / "privacy_ledger.jsonl"
    assert Ledger(path).open_entry()["rounds"] == [1, 3]
    assert run.main(command) == 0
    assert Ledger(path).charged_rounds() == 6
    assert {entry["attempt"] for entry in Ledger(path).entries if "attempt" in entry} == {0}


def test_replay_on_another_mesh_draws_new_keys_pays_for_both_and_ends_within_budget(
    command, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        crash_before(patch, dispatch, "commit")
        with pytest.raises(KeyboardInterrupt):
            run.main([*command, "--mesh=1x1"])
    assert run.main([*command, "--mesh=3x1"]) == 0
    kept = Ledger(tmp_path / "run" / "privacy_ledger.jsonl")
    assert [(entry["rounds"], entry["attempt"]) for entry in kept.begun] == [([1, 3], 0), ([1, 3], 1), ([3, 5], 0)]
    assert max(kept.epsilons(1e-3)) <= 8
    said = capsys.readouterr()
    assert "rounds 5 to 6 were not run" in said.out
    assert "warning: rounds 1 to 2 were lost and cannot be replayed, for not all is as it was (mesh)" in said.err
    assert ledger.main(["show", str(tmp_path / "run")]) == 0
    last = lines_of(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["round"] == 4
    assert last["epsilon_max"] == pytest.approx(max(kept.epsilons(1e-3)))


def test_last_dispatch_lost_and_not_repeatable_is_charged_in_the_final_figures(command, tmp_path, monkeypatch, capsys):
    commit, calls = dispatch.commit, []

    def crash_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        commit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "commit", crash_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            run.main([*command, "--mesh=1x1"])
    assert run.main([*command, "--mesh=3x1"]) == 0
    said = capsys.readouterr().out
    spent = Ledger(tmp_path / "run" / "privacy_ledger.jsonl").epsilons(1e-3)
    last = lines_of(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["round"] == 4
    assert "accuracy" in last
    assert last["epsilon"] == pytest.approx(spent)
    assert max(spent) > 7.9
    assert f"epsilon {max(spent):.3f}" in said


def test_a_ledger_that_does_not_hold_stops_a_resume_and_one_that_is_gone_means_new_secrets(
    command, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        crash_before(patch, run, "_finish")
        with pytest.raises(KeyboardInterrupt):
            run.main(command)
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
    assert run.main(command) == 0
    assert lines_of(path)[0]["causes"] != json.loads(lines[0])["causes"], "old secrets were used again"


def test_all_evaluation_counts_as_work_and_not_as_waiting(command, monkeypatch):
    busy, inside = [], []

    @contextlib.contextmanager
    def counted(clock):
        busy.append(clock)
        yield
        busy.pop()

    monkeypatch.setattr(progress.Clock, "busy", counted)
    made = setup.prepare

    def prepare(*args, **kwargs):
        prepared = made(*args, **kwargs)

        def evaluate(*args, **kwargs):
            inside.append(bool(busy))
            return prepared.evaluate(*args, **kwargs)

        return prepared._replace(evaluate=evaluate)

    monkeypatch.setattr(setup, "prepare", prepare)
    assert run.main([*command, "--rounds=2", "--eval_every=1"]) == 0
    assert inside == [True, True, True], "the base model, and each of two rounds"


def test_evaluation_asked_for_after_the_last_round_is_done(command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        crash_before(patch, run, "_finish")
        with pytest.raises(KeyboardInterrupt):
            run.main([*command, "--eval_every=0", "--dispatch_rounds=6"])
    assert run.main([*command, "--dispatch_rounds=6"]) == 0
    assert 0 <= lines_of(tmp_path / "run" / "metrics.jsonl")[-1]["accuracy"] <= 1


def test_records_that_changed_since_the_start_are_refused(command, finance_table, tmp_path, capsys, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.csv", "test.csv"):
        (data / name).write_text((finance_table / name).read_text())
    own = [*command, f"--data_dir={data}"]
    with monkeypatch.context() as patch:
        crash_before(patch, run, "_finish")
        with pytest.raises(KeyboardInterrupt):
            run.main([*own, "--eval_every=0", "--dispatch_rounds=6"])
    rows = (data / "train.csv").read_text()
    (data / "train.csv").write_text(rows + "profit rose again,good,north\n")
    assert run.main(own) == 2
    assert "began with" in capsys.readouterr().err
    (data / "train.csv").write_text(rows.replace("profit", "sales", 1))
    assert run.main(own) == 2
    assert "not those" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--model=no/such-model"], "hub"),
        (["--dataset=nothing"], "nothing"),
        (["--text_column=body"], "body"),
        (["--labels=good,fine"], "label"),
        (["--clients=61"], "61"),
        (["--partition=column:bank", "--clients=4"], "bank"),
        (["--partition=sideways"], "sideways"),
        (["--epsilon=2000"], "--epsilon"),
        (["--epsilon=none", "--noise_multiplier=1", "--delta=1e-17"], "--delta"),
        (["--prompt_column=text"], "--prompt_column"),
        (["--mesh=1x3"], "--mesh"),
        (["--mesh=99x1"], "99"),
        (["--max_length=99"], "--max_length"),
        (["--targets=z"], "'z'"),
        (["--last_layers=9"], "last_layers"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(command, tmp_path, capsys, monkeypatch, extra, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run.main([*command, *extra]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run" / "privacy_ledger.jsonl").exists(), "something was charged"


def test_missing_public_test_set_is_refused_unless_never_evaluated(command, finance_table, tmp_path, capsys):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "train.csv").write_bytes((finance_table / "train.csv").read_bytes())
    without = [*command, f"--data_dir={alone}", "--labels=good,bad"]
    assert run.main(without) == 2
    assert "--eval_every=0" in capsys.readouterr().err
    assert run.main([*without, "--eval_every=0", "--rounds=1"]) == 0


def test_corrupt_weights_are_refused(command, tiny_bert, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_bert.iterdir():
        data = path.read_bytes()
        (broken / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    assert run.main([*command, f"--model={broken}"]) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_rank_above_a_matrixs_own_size_is_a_warning(command, capsys):
    assert run.main([*command, "--rank=20", "--rounds=1"]) == 0
    assert "warning: rank 20" in capsys.readouterr().err


def test_run_by_column_with_unequal_clients_has_its_own_rates(command, tmp_path):
    assert run.main([*command, "--partition=dirichlet:0.5"]) == 0
    clients = json.loads((tmp_path / "run" / "config.json").read_text())["federation"]["clients"]
    assert len({client["records"] for client in clients}) > 1
    assert all(client["sampling_rate"] == min(1, 8 / client["records"]) for client in clients)
    assert all(7.9 < client["epsilon"] <= 8 for client in clients)
