"""Files of exact private statistics are their owner's alone from the moment they are made, and say what they are."""

import json
import os
import pathlib
import stat
import types

import pytest

from dplora_jax import private_files
from dplora_jax.config import RunConfig, replace
from dplora_jax.privacy import chain
from experiments import sweep
from experiments.attacks import audit, membership, memorisation
from experiments.sweep.cells import Options

RATES = {"tpr_at_0.001": 0.25, "tpr_at_0.01": 0.5, "auc": 0.75, "members": 60, "others": 30}
FOUND = {"exposure": [1.5], "extracted": [False], "epsilon": "-"}
LINE = {
    "metrics": {"accuracy": 0.5}, "epsilon_max": "inf", "bytes_up_per_client": 1, "seconds": 1.0, "of": "m on d",
    "settings": "x", "release": "NOT FOR RELEASE: no privacy", "commonest_label": None,
}  # fmt: skip


@pytest.fixture
def modes(monkeypatch):
    """Lets every permission through that is asked for, and no later change; yields what mode each new file was opened with."""
    made, real = {}, os.open

    def watched(path, options, mode=0o777, **more):
        if options & os.O_CREAT and not os.path.exists(path):
            made[pathlib.Path(path).name] = mode
        return real(path, options, mode, **more)

    monkeypatch.setattr(os, "open", watched)
    monkeypatch.setattr(os, "chmod", None)
    monkeypatch.setattr(os, "fchmod", lambda *_: None)  # of older files alone
    before = os.umask(0)
    yield made
    os.umask(before)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_membership_rates_are_for_the_owner(tmp_path, modes, monkeypatch, capsys):
    monkeypatch.setattr(membership, "attack", lambda *_: RATES)
    own = types.SimpleNamespace(seed=1)
    assert audit._membership(own, replace(RunConfig(), trust="local", epsilon=8.0), tmp_path) == 0
    document = json.loads((tmp_path / "membership.json").read_text())
    assert document["note"].startswith("PRIVATE")
    assert "NOT FOR RELEASE" in document["note"]
    assert [line["auc"] for line in document["runs"]] == [0.75, 0.75]
    assert mode_of(tmp_path / "membership.json") == modes["membership.json.draft"] == 0o600
    assert "PRIVATE" in capsys.readouterr().out


def test_exposures_are_for_the_owner(tmp_path, modes, monkeypatch, capsys):
    own = memorisation.Options(1, 1, 9, 1, str(tmp_path))
    monkeypatch.setattr(memorisation, "parse", lambda _: (None, own))
    monkeypatch.setattr(memorisation, "results", lambda *_: [("base model", FOUND)])
    assert memorisation.main([]) == 0
    assert "PRIVATE" in json.loads((tmp_path / "memorisation.json").read_text())["note"]
    assert mode_of(tmp_path / "memorisation.json") == modes["memorisation.json.draft"] == 0o600
    assert "PRIVATE" in capsys.readouterr().out


def test_a_sweeps_cells_and_tables_are_for_the_owner(tmp_path, modes, monkeypatch):
    """Some of its models have no privacy, and all noise of the others can be made again."""
    cell = types.SimpleNamespace(name={"case": "a", "seed": 1, "config": "c"}, config=RunConfig())
    monkeypatch.setattr(sweep, "parse", lambda _: ([cell], Options(tmp_path / "sweep.jsonl", 1, None)))
    monkeypatch.setattr(sweep, "outcome", lambda *_: LINE)
    assert sweep.main([]) == 0
    assert modes["sweep.jsonl"] == 0o600
    for suffix in (".jsonl", ".md", ".html"):
        assert mode_of(tmp_path / f"sweep{suffix}") == 0o600
        assert "NOT FOR RELEASE" in (tmp_path / f"sweep{suffix}").read_text()


def test_a_draft_that_others_may_read_is_not_written_into(tmp_path, modes):
    (tmp_path / "a.json.draft").write_text("left by a killed start")
    (tmp_path / "a.json").write_text("as another version wrote it")
    with open(tmp_path / "a.json.draft") as watched:
        private_files.write(tmp_path / "a.json", {"x": 1})
        assert watched.read() == "left by a killed start"
    assert mode_of(tmp_path / "a.json") == 0o600


def test_other_files_keep_the_modes_that_the_umask_gives(tmp_path, modes):
    os.umask(0o027)
    chain.replace_durably(tmp_path / "public", "x")
    assert mode_of(tmp_path / "public") == 0o640


def test_an_older_file_that_others_may_read_is_closed_to_them(tmp_path):
    (tmp_path / "cells.jsonl").write_text("{}\n")
    (tmp_path / "cells.jsonl").chmod(0o644)
    private_files.open_to_append(tmp_path / "cells.jsonl").close()
    assert mode_of(tmp_path / "cells.jsonl") == 0o600
