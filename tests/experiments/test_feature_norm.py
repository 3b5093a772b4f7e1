"""A run with --feature_norm: measured on public text alone, and gone from what is released."""

import json
import pathlib

import numpy as np
import pytest

from dplora_jax import models, peft
from dplora_jax.models import features
from experiments import flags, run, setup


@pytest.fixture
def command(tiny_bert, finance_table, tmp_path):
    return [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=2", "--rounds=2", "--expected_batch_size=8", "--rank=2", "--last_layers=1", "--delta=1e-3",
        "--epsilon=8", "--client_lr=0.3", "--head_lr=1", "--feature_norm=4", "--eval_every=1", f"--workdir={tmp_path / 'run'}",
    ]  # fmt: skip


def test_the_released_adapter_needs_no_centring(command, tiny_bert, finance_table, tmp_path):
    assert run.main(command) == 0
    model, base = models.from_pretrained(tiny_bert, num_labels=2)
    adapter, _ = peft.load(tmp_path / "run" / "adapter", model, base)
    config = flags.parse([*command, f"--workdir={tmp_path / 'other'}"])
    test = np.genfromtxt(finance_table / "test.csv", delimiter=",", dtype=str, skip_header=1)
    rows = models.load_tokenizer(config.model)(
        [row[0] for row in test], padding="max_length", max_length=8, truncation=True, return_tensors="np"
    )
    found = np.asarray(model.apply(base, {n: rows[n] for n in ("input_ids", "attention_mask")}, adapter)).argmax(1)
    prepared = setup.prepare(config)
    names = sorted({row[1] for row in test})
    right = np.mean([names[label] == row[1] for label, row in zip(found, test, strict=True)])
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["accuracy"] == pytest.approx(right)
    assert features.KEY in prepared.params


def test_the_centre_is_of_public_text_alone(command, finance_table, tmp_path):
    def center(train=lambda rows: rows, test=lambda rows: rows):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, change in (("train.csv", train), ("test.csv", test)):
            (folder / name).write_text(change((finance_table / name).read_text()))
        prepared = setup.prepare(flags.parse([*command, f"--data_dir={folder}"]))
        return np.asarray(prepared.params[features.KEY]["center"])

    plain = center()
    np.testing.assert_array_equal(center(train=lambda rows: rows.replace("profit", "sales")), plain)
    assert np.abs(center(test=lambda rows: rows.replace("profit", "sales")) - plain).max() > 1e-3
    flipped = {"good": "bad", "bad": "good"}
    relabelled = lambda rows: "\n".join(  # noqa: E731
        ",".join(flipped.get(cell, cell) for cell in row.split(",")) for row in rows.split("\n")
    )
    np.testing.assert_array_equal(center(test=relabelled), plain)


def test_without_public_text_or_a_head_it_is_refused(command, finance_table, tmp_path, capsys):
    (tmp_path / "train.csv").write_text((finance_table / "train.csv").read_text())
    bare = [*command, f"--data_dir={tmp_path}", "--labels=good,bad", "--eval_every=0"]
    assert run.main(bare) == 2
    assert "--feature_norm is measured on a public test set" in capsys.readouterr().err
    assert run.main([*command, "--feature_norm=0"]) == 2
    assert "above 0" in capsys.readouterr().err
    assert not pathlib.Path(tmp_path / "run" / "privacy_ledger.jsonl").exists()
