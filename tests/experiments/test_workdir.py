"""What an earlier start in a working directory allows a later one to change."""

import json

import pytest

from dplora_jax.config import RunConfig, replace
from dplora_jax.errors import InputError
from dplora_jax.federation import resuming, workdir_files
from dplora_jax.finetuning import setup
from dplora_jax.privacy.accounting import Mechanism
from dplora_jax.privacy.ledger import Ledger, describe
from experiments import cli, run
from tests.experiments.ledger_workdirs import write_checkpoint

CONFIG = cli.settle(replace(RunConfig(), epsilon=2, clients=1))
MECHANISM = Mechanism(100, 0.2, 35, 1.1)
FEDERATION = {"clients": [describe(MECHANISM) | {"client": 0, "epsilon": 1.5}], "release": "for release"}
COMMAND = ["--epsilon=2", "--clients=1"]


def test_a_flag_that_a_later_version_added_was_at_its_default(tmp_path):
    workdir_files.write_config(tmp_path, CONFIG, FEDERATION)
    document = json.loads((tmp_path / "config.json").read_text())
    del document["quantize"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert resuming.stored_config(tmp_path, CONFIG).document == document
    with pytest.raises(InputError, match="another `quantize`"):
        resuming.stored_config(tmp_path, replace(CONFIG, quantize="int8"))


@pytest.mark.parametrize("flag", ["encoding", "separator"])
def test_what_decides_how_a_table_is_read_may_not_change(flag, tmp_path):
    workdir_files.write_config(tmp_path, CONFIG, FEDERATION)
    with pytest.raises(InputError, match=f"another `{flag}`"):
        resuming.stored_config(tmp_path, replace(CONFIG, **{flag: "cp1252"}))


def test_nothing_that_config_json_says_is_kept_before_the_first_charge(tmp_path, monkeypatch, capsys):
    """An edited row of a mechanism, the features, the release: all of it is made anew, and config.json and round 0 with it."""
    seen = []

    def prepare(config, stored, command, clock):
        seen.append(stored)
        raise InputError("seen.")

    monkeypatch.setattr(setup, "prepare", prepare)
    command = [*COMMAND, f"--workdir={tmp_path}"]
    config = cli.parse(command)
    edited = {"clients": [FEDERATION["clients"][0] | {"noise_multiplier": 9.0}], "release": "for release"}
    workdir_files.write_config(tmp_path, config, edited)
    write_checkpoint(tmp_path, 0, Ledger(tmp_path / "privacy_ledger.jsonl").anchor)
    assert run.main(command) == 2
    assert seen == [None]
    assert not (tmp_path / "checkpoints").exists()
    Ledger(tmp_path / "privacy_ledger.jsonl").begin((1, 2), 0, [MECHANISM], 1, {})
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secrets.json").write_text("[]")
    assert run.main(command) == 2
    assert seen[1] == json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    assert run.main(command) == 2
    assert "config.json is gone, and rounds were charged by it" in capsys.readouterr().err


def test_another_config_json_than_the_one_that_was_charged_by_is_refused_before_it_is_used(tmp_path):
    """Whatever it says: what a restart takes from there, the mechanisms and the features' centre say, no later edit may change or
    break."""
    workdir_files.write_config(tmp_path, CONFIG, FEDERATION | {"features": [1]})
    ledger, path = Ledger(tmp_path / "privacy_ledger.jsonl"), tmp_path / "config.json"
    ledger.begin((1, 2), 0, [MECHANISM], 1, {}, config=workdir_files.read_config(tmp_path).digest)
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written))  # laid out another way
    assert resuming.charged_config(tmp_path, resuming.stored_config(tmp_path, CONFIG), ledger) == written
    quieter = [FEDERATION["clients"][0] | {"noise_multiplier": 0.1}]
    for edited in {"features": [2]}, {"clients": quieter}, {"release": None}:
        path.write_text(json.dumps(written | {"federation": written["federation"] | edited}))
        with pytest.raises(InputError, match=r"config\.json is not the one that the ledger was charged by"):
            resuming.charged_config(tmp_path, resuming.stored_config(tmp_path, CONFIG), ledger)
    for broken in 5, [], [{}], [FEDERATION["clients"][0] | {"noise_multiplier": "0.1"}]:
        path.write_text(json.dumps(written | {"federation": FEDERATION | {"clients": broken}}))
        with pytest.raises(InputError, match=r"config\.json is damaged"):
            resuming.stored_config(tmp_path, CONFIG)
