"""A command whose files cannot be written ends with one sentence and code 74, wherever it writes them."""

import errno
import json
import os

import jax.numpy as jnp
import pytest

from dplora_jax import checkpoint
from dplora_jax.errors import InputError, NotFiniteError, Refused, StorageError
from dplora_jax.federation import processes, storage, workdir_files
from dplora_jax.privacy import chain, secrets
from dplora_jax.privacy.accounting import Mechanism
from dplora_jax.privacy.ledger import Ledger
from experiments import budget, ledger, report, run, sweep
from experiments.cli import exits
from tests.experiments.report_pages import config, metrics

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/there/file")


def fail(error=FULL):
    def failing(*_, **__):
        raise error

    return failing


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError("wrong."), 2), (NotFiniteError("nan."), 65), (StorageError("full."), 74), (FULL, 74)],
)
def test_each_error_has_its_code_and_one_sentence(error, code, capsys):
    assert exits.guarded(fail(error))() == code
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_bad_input_stays_what_it_is_where_several_processes_are_told(tmp_path, monkeypatch):
    """What an error came from, or quotes, makes no other code of it, and a Refused stays one."""
    wrong = Refused("m/config.json cannot be read (Permission denied).", "the reason")
    wrong.__context__ = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "m/config.json")
    ended = []
    monkeypatch.setattr(run, "run", fail(wrong))
    monkeypatch.setattr(processes, "fail", ended.append)
    run.main(["--epsilon=8", f"--workdir={tmp_path}"])
    assert ended == [wrong]


def test_a_reader_that_goes_away_is_told_in_a_sentence(capfd, monkeypatch):
    """As in `verify ... | head -0`: the end of the process flushes nothing more."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert exits.guarded(lambda: print("it holds."))() == 74
    assert capfd.readouterr().err == "error: the output cannot be written (Broken pipe).\n"


def test_a_fault_of_the_program_stays_a_fault():
    with pytest.raises(KeyError):
        exits.guarded(fail(KeyError("rounds")))()


def test_an_output_that_cannot_be_written_is_told_of_every_command(tmp_path, monkeypatch, capsys):
    """What it prints included: a log on a full disk."""
    (tmp_path / "config.json").write_text(json.dumps(config()))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics()))
    monkeypatch.setattr(report, "replace_durably", fail())
    assert report.main([str(tmp_path)]) == 74
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail())
    question = ["--records=100", "--clients=1", "--epsilon=8", "--rounds=2", "--expected_batch_size=10"]
    assert budget.main([*question, f"--plot={tmp_path / 'a.svg'}"]) == 74
    monkeypatch.setattr("builtins.print", lambda *_, **more: None if more.get("file") else fail()())
    assert budget.main([*question, "--json"]) == 74
    monkeypatch.undo()
    monkeypatch.setattr(sweep, "parse", fail())
    assert sweep.main([]) == 74


def test_a_folder_that_is_lost_while_it_is_read_is_not_called_damaged(tmp_path, monkeypatch, capsys):
    for file in tmp_path / "config.json", tmp_path / "1" / "notes" / "metadata":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")

    stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(tmp_path))

    def losing(opened):
        return lambda path, *more, **named: (fail(stale) if str(tmp_path) in str(path) else opened)(
            path, *more, **named
        )

    monkeypatch.setattr("os.open", losing(os.open))
    monkeypatch.setattr("builtins.open", losing(open))
    for command in (
        lambda: ledger.main(["verify", str(tmp_path)]),
        lambda: report.main([str(tmp_path)]),
        exits.guarded(lambda: checkpoint.anchors(tmp_path)),
    ):
        assert command() == 74
        assert "Stale file handle" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_workdir_that_may_not_be_written_is_74(code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pathlib.Path.mkdir", fail(OSError(code, os.strerror(code), str(tmp_path))))
    assert run.main(["--epsilon=8", f"--workdir={tmp_path / 'run'}"]) == 74
    assert os.strerror(code) in capsys.readouterr().err


def test_a_workdir_that_is_a_file_is_bad_input(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run.main(["--epsilon=8", f"--workdir={tmp_path / 'file'}"]) == 2


def test_a_workdir_that_vanishes_under_a_run_is_74(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    monkeypatch.setattr(run, "run", lambda *_: (folder / "gone" / "file").write_text(""))
    assert run.main(["--epsilon=8", f"--workdir={folder}"]) == 74
    assert "No such file" in capsys.readouterr().err


def test_a_charge_that_could_not_be_written_is_no_charge(tmp_path, monkeypatch):
    """Neither half a line nor a whole one that was not promised counts when there is room again."""
    kept = Ledger(tmp_path / "ledger.jsonl")
    mechanisms = [Mechanism(100, 0.2, 35, 1.1)]
    kept.begin((1, 3), 0, mechanisms, 1, {"base": "0b"})
    kept.commit((1, 3), 0)
    monkeypatch.setattr(os, "fsync", fail())
    with pytest.raises(OSError, match="No space"):
        kept.begin((3, 5), 0, mechanisms, 1, {"base": "0b"})
    monkeypatch.undo()
    with open(tmp_path / "ledger.jsonl", "a") as file:
        file.write('{"previous": "half of')
    again = Ledger(tmp_path / "ledger.jsonl")
    assert [entry["entry"] for entry in again.entries] == ["begin", "commit", "begin"]
    assert again.open_entry()["rounds"] == [3, 5]
    again.commit((3, 5), 0)
    assert Ledger(tmp_path / "ledger.jsonl").charged_rounds() == 4


def test_orbaxs_own_error_is_told_and_an_older_checkpoint_stays(tmp_path, monkeypatch, capsys):
    manager = checkpoint.Checkpoints(tmp_path)
    notes = {"ledger": {"entries": 0, "head": "0"}}
    manager.save(1, {"state": jnp.ones(3)}, notes)
    manager.wait()
    monkeypatch.setattr(manager._manager, "wait_until_finished", fail(ValueError("UNKNOWN: No space left on device")))
    assert exits.guarded(lambda: manager.save(2, {"state": jnp.ones(3)}, notes))() == 74
    monkeypatch.undo()
    assert manager.restore({"state": jnp.zeros(3)})[0] == 1
    manager.close()


def test_a_torn_line_of_diagnostics_goes_when_the_next_is_written(tmp_path):
    kept = storage.Workdir(tmp_path, None, None, None, False)
    kept.keep_private([{"round": 1, "loss": [0.5]}, {"round": 2, "loss": [float("nan")]}])
    path = tmp_path / "private" / "diagnostics.jsonl"
    path.write_text(path.read_text() + '{"round": 3, "no')
    kept.keep_private([{"round": 3, "loss": [0.5]}, {"round": 4, "loss": [float("nan")]}])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines] == [[0.5], ["nan"]] * 2


def test_what_replaces_a_file_leaves_the_old_one_where_it_fails(tmp_path, monkeypatch):
    workdir_files.write_metrics(tmp_path, [{"round": 0}])
    monkeypatch.setattr(os, "fsync", fail())
    with pytest.raises(OSError, match="No space"):
        workdir_files.write_metrics(tmp_path, [{"round": 0}, {"round": 1}])
    monkeypatch.undo()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"round": 0}
    chain.replace_durably(tmp_path / "metrics.jsonl", "")


def test_secrets_that_could_not_be_made_are_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fail())
    with pytest.raises(OSError, match="No space"):
        secrets.load_or_create(tmp_path / "private", 2)
    monkeypatch.undo()
    assert secrets.load(tmp_path / "private") is None
    assert len(secrets.load_or_create(tmp_path / "private", 2)) == 2
    assert [path.name for path in (tmp_path / "private").iterdir()] == ["secrets.json"]
