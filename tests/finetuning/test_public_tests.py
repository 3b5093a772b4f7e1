"""Public tasks beside a run."""

from dplora_jax.config import RunConfig, replace
from dplora_jax.finetuning import public_tests


def test_a_benchmarks_table_is_read_as_the_flags_say(tmp_path):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.csv").write_bytes("goal;sol1;sol2;label\ng;café;y;0\n".encode("cp1252"))
    config = replace(
        RunConfig(), benchmarks_dir=str(tmp_path), dataset="csv", encoding="cp1252", separator=";", benchmarks=("piqa",)
    )
    asked = public_tests._asked(config, None, (), "piqa")
    assert [one.answers for one in asked] == [(" café", " y")]
