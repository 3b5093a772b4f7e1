"""What an earlier start in a working directory allows a later one to change."""

import json

import pytest
from ledger_workdirs import write_checkpoint

from dplora_jax.errors import InputError
from dplora_jax.privacy.accounting import Mechanism
from dplora_jax.privacy.ledger import Ledger
from experiments import flags, run, setup, workdir

CONFIG = flags.RunConfig()


def test_a_flag_that_a_later_version_added_was_at_its_default(tmp_path):
    workdir.write_config(tmp_path, CONFIG, {"clients": []})
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["quantize"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert workdir.stored_config(tmp_path, CONFIG) == stored
    with pytest.raises(InputError, match="another --quantize"):
        workdir.stored_config(tmp_path, flags.RunConfig(quantize="int8"))


@pytest.mark.parametrize("flag", ["encoding", "separator"])
def test_what_decides_how_a_table_is_read_may_not_change(flag, tmp_path):
    workdir.write_config(tmp_path, CONFIG, {"clients": []})
    with pytest.raises(InputError, match=f"another --{flag}"):
        workdir.stored_config(tmp_path, flags.RunConfig(**{flag: "cp1252"}))


def test_nothing_that_config_json_says_is_kept_before_the_first_charge(tmp_path, monkeypatch, capsys):
    """An edited row of a mechanism, the features, the release: all of it is made anew, and config.json and round 0 with it."""
    seen = []

    def prepare(config, stored):
        seen.append(stored)
        raise InputError("seen.")

    monkeypatch.setattr(setup, "prepare", prepare)
    command = ["--epsilon=2", f"--workdir={tmp_path}"]
    config = flags.parse(command)
    workdir.write_config(tmp_path, config, {"clients": [{"noise_multiplier": 9.0}]})
    write_checkpoint(tmp_path, 0, Ledger(tmp_path / "privacy_ledger.jsonl").anchor)
    assert run.main(command) == 2
    assert seen == [None]
    assert not (tmp_path / "checkpoints").exists()
    Ledger(tmp_path / "privacy_ledger.jsonl").begin((1, 2), 0, [Mechanism(100, 0.2, 35, 1.1)], 1, {})
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secrets.json").write_text("[]")
    assert run.main(command) == 2
    assert seen[1] == json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    assert run.main(command) == 2
    assert "config.json is gone, and rounds were charged by it" in capsys.readouterr().err
