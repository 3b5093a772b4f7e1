"""What a party that shares no machine reads."""

import pytest

from dplora_jax.errors import InputError
from dplora_jax.finetuning import parties
from experiments import cli
from tests.experiments.public_measures import arguments


@pytest.mark.parametrize("named", [True, False])
def test_a_party_refuses_its_own_rows_as_the_public_test_set(tiny_bert, finance_table, tmp_path, named):
    rows = (finance_table / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(rows)
    held = tmp_path / ("public.csv" if named else "test.csv")
    command = [*arguments(tiny_bert, finance_table, tmp_path), f"--data_dir={tmp_path}", "--labels=good,bad"]
    config = cli.parse([*command, *([f"--test_data={held}"] if named else [])])
    held.write_text(rows)
    with pytest.raises(InputError, match="refused as a public test set"):
        parties.own_records(config)
    held.write_text("\n".join(rows.splitlines()[:9]))
    assert parties.own_records(config).count == 60


def test_a_party_that_trains_on_a_few_rows_refuses_a_test_set_that_holds_these(tiny_bert, finance_table, tmp_path):
    (tmp_path / "train.csv").write_text((finance_table / "train.csv").read_text())
    (tmp_path / "test.csv").write_text("text,label\nbank rose,good\n")
    command = [*arguments(tiny_bert, finance_table, tmp_path), f"--data_dir={tmp_path}", "--labels=good,bad"]
    config = cli.parse([*command, "--train_records=1"])
    (text,) = parties.own_records(config).texts
    (tmp_path / "test.csv").write_text(f"text,label\n{text},good\n")
    with pytest.raises(InputError, match="refused as a public test set"):
        parties.own_records(config)
