"""A sweep runs each cell once, goes on where it was, and says means and deviations over seeds."""

import json

import pytest

from dplora_jax.errors import InputError
from experiments import flags, run, sweep


@pytest.fixture
def command(tiny_bert, finance_table, tmp_path):
    return [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=2", "--rounds=2", "--expected_batch_size=8", "--rank=2", "--delta=1e-3",
        "--client_lr=0.1", "--head_lr=1", f"--out={tmp_path / 'cells.jsonl'}", "--seeds=1,2",
        "--case=FedAvg:", "--case=exact: --aggregation=fedex", "--vary=epsilon=8|inf",
    ]  # fmt: skip


def test_cells_are_the_product_of_cases_values_and_seeds(command):
    cells, _ = sweep.parse(command)
    assert len(cells) == 8
    assert {(c.aggregation, c.trust, c.seed, c.split_seed) for _, c in cells} == {
        (a, t, s, s) for a in ("fedavg", "fedex") for t in ("local", "none") for s in (1, 2)
    }


def test_finished_cells_are_not_run_again_and_a_torn_line_is(command, tmp_path, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(sweep, "outcome", lambda config, memo, programs: ran.append(config) or told(config))
    assert sweep.main(command) == 0
    out = tmp_path / "cells.jsonl"
    lines = out.read_text().splitlines()
    assert (len(ran), len(lines)) == (8, 8)
    out.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20] + "\n")
    assert sweep.main(command) == 0
    assert len(ran) == 9
    table = capsys.readouterr().out.strip().splitlines()[-4:]
    assert (
        table[0] == "| case | epsilon 8 accuracy | epsilon 8 macro f1 | epsilon inf accuracy | epsilon inf macro f1 |"
    )
    assert table[2] == "| FedAvg | 0.150 ± 0.071 | 0.500 ± 0.000 | 0.150 ± 0.071 | 0.500 ± 0.000 |"


def told(config):
    return {"accuracy": config.seed / 10, "macro_f1": 0.5, "epsilon_max": 1.0, "seconds": 0.1}


def test_a_cell_ends_as_a_run_of_its_flags_does(command, tmp_path):
    memo, programs = {}, {}
    cells, _ = sweep.parse(command)
    for name, config in (cells[0], cells[6]):
        found = sweep.outcome(config, memo, programs)
        more = ["--aggregation=fedex"] if name["case"] == "exact" else []
        plain = [word for word in command if not word.startswith(("--out", "--seeds", "--case", "--vary"))]
        folder = tmp_path / name["case"]
        seeds = [f"--epsilon={name['epsilon']}", f"--seed={name['seed']}", f"--split_seed={name['seed']}"]
        assert run.main([*plain, *more, *seeds, f"--workdir={folder}"]) == 0
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert (found["accuracy"], found["macro_f1"]) == (last["accuracy"], last["macro_f1"])
        assert found["epsilon_max"] == last["epsilon_max"]


@pytest.mark.parametrize(
    ("more", "words"),
    [(["--case=nameless"], "needs NAME:"), (["--vary=epsilon"], "malformed"), (["--seeds=x"], "whole numbers")],
)
def test_what_makes_no_cells_is_refused(command, more, words):
    with pytest.raises(InputError, match=words):
        sweep.parse([*command, *more])


def test_options_of_two_words_are_understood(command):
    spaced = [part for word in command for part in word.split("=", 1)]
    assert [config for _, config in sweep.parse(spaced)[0]] == [config for _, config in sweep.parse(command)[0]]
    assert isinstance(sweep.parse(spaced)[0][0][1], flags.RunConfig)
