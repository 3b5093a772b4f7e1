"""What an earlier start in a working directory allows a later one to change."""

import json

import pytest

from dplora_jax.errors import InputError
from experiments import flags, workdir

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
