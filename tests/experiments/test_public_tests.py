"""Public tasks beside a run."""

import types

from dplora_jax.finetuning import public_tests


def test_a_benchmarks_table_is_read_as_the_flags_say(tmp_path):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.csv").write_bytes("goal;sol1;sol2;label\ng;café;y;0\n".encode("cp1252"))
    flags = {"benchmarks_dir": str(tmp_path), "data_dir": None, "partition": "iid", "benchmark_records": None}
    flags |= {"dataset": "csv", "chat": False, "split_seed": 0, "encoding": "cp1252", "separator": ";"}
    asked = public_tests._asked(types.SimpleNamespace(**flags), None, (), "piqa")
    assert [one.answers for one in asked] == [(" café", " y")]
