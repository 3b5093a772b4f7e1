"""What public text tells of a base model in small runs, where texts change or a run is killed."""

import json

import pytest

from dplora_jax.federation.federation import Federation
from dplora_jax.finetuning import setup
from dplora_jax.models import features
from experiments import cli
from tests.experiments.small_runs import crash_before, fit

FLIPPED = {"good": "bad", "bad": "good"}


def arguments(tiny_bert, finance_table, tmp_path):
    """The flags of a small run of a classifier, with a public test set."""
    return [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=2", "--rounds=2", "--expected_batch_size=8", "--rank=2", "--last_layers=1", "--delta=1e-3",
        "--epsilon=8", "--client_lr=0.3", "--head_lr=1", "--eval_every=1", f"--workdir={tmp_path / 'run'}",
    ]  # fmt: skip


def measured(command, finance_table, folder, train=lambda rows: rows, test=lambda rows: rows):
    """What public text tells of the base model of `command`, where the tables' texts are changed by these functions."""
    folder.mkdir()
    for name, change in (("train.csv", train), ("test.csv", test)):
        (folder / name).write_text(change((finance_table / name).read_text()))
    return setup.prepare(cli.parse([*command, f"--data_dir={folder}"])).federation.params[features.KEY]


def labelled_by_words(rows):
    """A table whose labels are words of the tiny tokenizer, as a language model says them."""
    return rows.replace(",good", ",rose").replace(",bad", ",fell")


def relabelled(rows):
    """A table with each label the other one."""
    return "\n".join(",".join(FLIPPED.get(cell, cell) for cell in row.split(",")) for row in rows.split("\n"))


def measured_anew(command, finance_table, folder):
    """(config.json, what public text told of the base model) of a run that was killed before its end, then what the next start
    takes for it where the public text is another by then, and what a fresh run would measure."""
    for name in ("train.csv", "test.csv"):
        (folder / name).write_text((finance_table / name).read_text())
    own = [*command, f"--data_dir={folder}", f"--test_data={folder / 'test.csv'}"]
    before = setup.prepare(cli.parse(own)).federation.params[features.KEY]
    with pytest.MonkeyPatch.context() as patch:
        crash_before(patch, Federation, "_finish")
        with pytest.raises(KeyboardInterrupt):
            fit(own)
    kept = json.loads((folder / "run" / "config.json").read_text())
    (folder / "test.csv").write_text((finance_table / "test.csv").read_text().replace("profit", "sales"))
    resumed, fresh = (setup.prepare(cli.parse(own), stored).federation.params[features.KEY] for stored in (kept, None))
    return kept, before, resumed, fresh
