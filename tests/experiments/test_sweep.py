"""A sweep runs each cell once, goes on where it was, and says means and deviations over seeds."""

import collections
import json
import math

import pytest

from dplora_jax.config import RunConfig, deciding, replace
from dplora_jax.errors import InputError
from experiments import sweep
from experiments.sweep import cells as sweep_cells
from experiments.sweep import report as sweep_report
from tests.conftest import mostly_slow
from tests.experiments.small_runs import fit

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def command(tiny_bert, finance_table, tmp_path):
    return [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=2", "--rounds=2", "--expected_batch_size=8", "--rank=2", "--delta=1e-3",
        "--client_lr=0.1", "--head_lr=1", f"--out={tmp_path / 'cells.jsonl'}", "--seeds=1,2",
        "--case=FedAvg:", "--case=exact: --aggregation=fedex", "--vary=epsilon=8|inf",
    ]  # fmt: skip


def test_cells_are_the_product_of_cases_values_and_seeds(command):
    cells, _ = sweep_cells.parse(command)
    assert len(cells) == 8
    assert {
        (c.aggregation.method, c.privacy.trust, c.privacy.seed, c.schedule.split_seed)
        for c in (cell.config for cell in cells)
    } == {(a, t, s, s) for a in ("fedavg", "fedex") for t in ("local", "none") for s in (1, 2)}


def test_what_auto_chose_is_said_once_for_all_cells_that_have_it(command, capsys):
    plain = [word for word in command if not word.startswith(("--case", "--client_lr"))]
    cells, _ = sweep_cells.parse([*plain, "--auto"])
    said = capsys.readouterr().err.splitlines()
    assert len(cells) == 4
    assert len(said) == 2, "one choice with privacy, one without"
    assert all(line.startswith("--auto chose ") for line in said)
    assert f"--client_lr={cells[0].config.optimizer.client_lr}" in said[0]


def test_a_cell_that_ran_under_another_name_is_not_run_again(command, monkeypatch):
    plain = [word for word in command if not word.startswith(("--case", "--vary", "--delta", "--seeds"))]
    ran = []
    found = {"metrics": {"accuracy": 0.5}, "epsilon_max": 8.0, "bytes_up_per_client": 1, "seconds": 1.0}
    monkeypatch.setattr(sweep, "outcome", lambda cell, *_: ran.append(cell.config) or found)
    assert sweep.main([*plain, "--vary=epsilon=4|8", "--delta=1e-3"]) == 0
    assert sweep.main([*plain, "--vary=delta=1e-2|1e-3", "--epsilon=8"]) == 0
    assert [(config.privacy.epsilon, config.privacy.delta) for config in ran] == [(4, 1e-3), (8, 1e-3), (8, 1e-2)]
    ran.clear()
    assert sweep.main([*plain, "--vary=epsilon=8", "--delta=1e-3", "--controls"]) == 0
    assert len(ran) == 7, "what is measured without training was taken for a run of the same flags"


def test_a_case_with_the_name_of_a_control_is_refused(command, capsys):
    assert sweep.main([*command, "--case=base model: --epsilon=8", "--controls"]) == 2
    assert "one of --controls" in capsys.readouterr().err


def test_cells_keep_their_names_when_a_flag_is_added(command, monkeypatch):
    cells, _ = sweep_cells.parse(command)
    config, digest = cells[0].config, cells[0].name["config"]
    earlier = lambda *kinds: [name for name in deciding(*kinds) if name != "feature_norm"]  # noqa: E731
    with monkeypatch.context() as without:
        without.setattr(sweep_cells, "deciding", earlier)
        assert sweep_cells._digest(config, sweep_cells.RUN) == digest
    assert sweep_cells._digest(replace(config, feature_norm=8.0), sweep_cells.RUN) != digest
    assert sweep_cells._digest(replace(config, workdir="elsewhere"), sweep_cells.RUN) == digest
    assert sweep_cells._digest(config, sweep_cells.BASE) != digest


def test_settings_are_the_flags_whatever_the_seed(command):
    cells, _ = sweep_cells.parse(command)
    found = {sweep_cells.settings(cell) for cell in cells}
    assert len(found) == 4, "two cases and two budgets, of two seeds each"
    more, _ = sweep_cells.parse([*command, "--rounds=3"])
    assert not found & {sweep_cells.settings(cell) for cell in more}
    auto = cells[0]._replace(config=replace(cells[0].config, auto=True))
    other = auto._replace(config=replace(auto.config, client_lr=0.77))
    assert sweep_cells.settings(auto) == sweep_cells.settings(other)


def test_scaled_features_are_clipped_without_privacy_too_and_no_control_is_run_twice(command):
    plain = [word for word in command if not word.startswith(("--case", "--vary"))]
    norms = lambda *more: {  # noqa: E731
        cell.name["case"]: cell.config.privacy.clip_norm
        for cell in sweep_cells.parse([*plain, "--epsilon=8", "--controls", *more])[0]
    }
    scaled, usual = norms("--feature_norm=8"), norms()
    assert {*scaled.values()} == {1.0}
    assert usual.keys() - scaled.keys() == {"no privacy"}
    assert usual["no privacy"] == usual[sweep_cells.BEST] == math.inf
    assert usual["clipped, no noise"] == 1.0


def test_controls_without_privacy_are_run_once_for_all_budgets(command):
    cells, _ = sweep_cells.parse([*command, "--controls", "--vary=rank=2|4"])
    plain = [cell for cell in cells if cell.name["case"] not in ("FedAvg", "exact")]
    counts = collections.Counter(cell.name["case"] for cell in plain)
    assert counts == {
        "base model": 4, "no privacy": 4, "clipped, no noise": 4, "best client alone, no privacy": 4,
        "all data in one client": 8, "first client alone": 8, "head alone": 8,
    }  # fmt: skip
    by_case = {cell.name["case"]: cell for cell in plain if cell.name["rank"] == "4"}
    assert by_case["base model"].kind == sweep_cells.BASE
    assert by_case["no privacy"].config.privacy.clip_norm == math.inf
    assert (
        by_case["clipped, no noise"].config.privacy.clip_norm,
        by_case["clipped, no noise"].config.privacy.trust,
    ) == (1, "none")
    pooled, alone = by_case["all data in one client"].config, by_case["first client alone"].config
    assert (pooled.schedule.clients, pooled.schedule.expected_batch_size) == (1, 16)
    assert (alone.schedule.clients, alone.data.parties, alone.schedule.expected_batch_size) == (1, 2, 8)
    assert by_case["head alone"].config.lora.head_only


def test_controls_follow_what_is_varied_and_those_that_do_not_fit_are_left_out(command, capsys):
    plain = [word for word in command if not word.startswith("--case")]
    cells, _ = sweep_cells.parse([*plain, "--controls", "--vary=clients=2|5"])
    found = {
        (cell.name["case"], cell.name["clients"]): (cell.config.data.parties, cell.config.schedule.expected_batch_size)
        for cell in cells
    }
    assert found["first client alone", "2"] == (2, 8)
    assert found["first client alone", "5"] == (5, 8)
    assert found["all data in one client", "5"] == (None, 40)
    capsys.readouterr()
    alone = [word for word in plain if not word.startswith("--vary")]
    cells, _ = sweep_cells.parse([*alone, "--controls", "--epsilon=8", "--trust=distributed", "--survivors=2"])
    assert any(cell.name["case"] == "head alone" for cell in cells)
    assert not any(cell.name["case"] == "no privacy" for cell in cells)
    assert "warning: the control 'no privacy' cannot be used with these flags" in capsys.readouterr().err


def test_the_best_client_alone_is_the_best_of_all_of_them(command, monkeypatch):
    """Every client is trained alone, and the largest accuracy stands for them."""
    cells, _ = sweep_cells.parse([*command, "--controls"])
    cell = next(cell for cell in cells if cell.kind == sweep_cells.BEST)
    facts = {"clients": [{"epsilon": 0.0}], "communication": {"bytes_up_per_client_per_round": 1}, "release": None}
    facts["data"] = {"commonest_label": 0.5}
    asked = []
    told = lambda config, *_: asked.append(config.data.party) or ({"accuracy": [0.3, 0.8][config.data.party]}, facts)  # noqa: E731
    monkeypatch.setattr(sweep, "_trained", told)
    assert sweep.outcome(cell, {}, {})["metrics"] == {"accuracy": 0.8}
    assert asked == [0, 1]


def test_a_cell_of_other_flags_is_another_cell(command, monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(sweep, "outcome", lambda cell, memo, programs: ran.append(cell) or told(cell))
    assert sweep.main(command) == 0
    assert sweep.main([*command, "--rounds=3"]) == 0
    assert len(ran) == 16
    assert sweep.main([*command, f"--workdir={tmp_path}"]) == 0  # where a run would write does not matter
    assert len(ran) == 16


def test_finished_cells_are_not_run_again_and_a_torn_line_is(command, tmp_path, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(sweep, "outcome", lambda cell, memo, programs: ran.append(cell) or told(cell))
    assert sweep.main(command) == 0
    out = tmp_path / "cells.jsonl"
    lines = out.read_text().splitlines()
    assert (len(ran), len(lines)) == (8, 8)
    out.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    assert sweep.main(command) == 0
    assert len(ran) == 9
    table = capsys.readouterr().out.strip().splitlines()[:4]
    assert (
        table[0] == "| case | epsilon 8 accuracy | epsilon 8 macro-F1 | epsilon inf accuracy | epsilon inf macro-F1 |"
    )
    assert table[2] == "| FedAvg | 0.150 ± 0.071 | 0.500 ± 0.000 | 0.150 ± 0.071 | 0.500 ± 0.000 |"
    assert (tmp_path / "cells.md").read_text().splitlines()[:4] == table
    html = (tmp_path / "cells.html").read_text()
    assert html.count("<svg") == 2
    assert "NOT for release".lower() in html.lower()
    assert "0.150 ± 0.071" in html


def test_a_case_without_a_budget_stands_at_every_budget(tmp_path):
    lines = [
        {"case": case, "epsilon": epsilon, "seed": seed, "metrics": {"accuracy": value}, "seconds": 1.0}
        for case, epsilon, seed, value in (
            ("FedAvg", "2", 1, 0.5), ("FedAvg", "2", 2, 0.7), ("FedAvg", "8", 1, 0.8), ("no privacy", "any", 1, 0.9),
        )
    ]  # fmt: skip
    table = sweep_report.table(lines)
    assert table.head == ["case", "epsilon 2 accuracy", "epsilon 8 accuracy"]
    assert table.rows == [["FedAvg", "0.600 ± 0.141", "0.800"], ["no privacy", "0.900", "0.900"]]
    deltas = [{"case": "FedAvg", "delta": "1e-3", "seed": 1, "metrics": {"accuracy": 0.4}, "seconds": 1.0}]
    both = sweep_report.markdown(lines + deltas)
    assert "epsilon 2 accuracy" in both
    assert "delta 1e-3 accuracy" in both
    assert "NOT FOR RELEASE" in both
    assert len(sweep_report.contents(lines + deltas)["groups"]) == 2


def test_a_cell_without_a_finite_metric_stands_in_the_table_and_is_no_best(tmp_path):
    found = [("nan", 1), (0.5, 2), (0.7, 3)]
    lines = [{"case": "one", "seed": seed, "config": "a", "metrics": {"accuracy": value}} for value, seed in found]
    assert "| one | nan ± nan |" in sweep_report.markdown(lines)
    assert sweep_report.spread([float("inf"), 1.0]) == "inf ± nan"
    assert sweep._better({"accuracy": float("nan")}) < sweep._better({"accuracy": 0.0})
    assert sweep._better({"perplexity": float("nan")}) < sweep._better({"perplexity": 1e9})


def test_values_stand_in_their_order_whenever_they_were_run():
    line = {"case": "A", "seed": 1, "metrics": {"accuracy": 0.5}}
    lines = [line | {"rank": rank, "epsilon": e} for rank in ("4", "2") for e in ("8", "inf", "2", "any", "10")]
    each = ("2", "8", "10", "inf")
    assert sweep_report.columns(lines) == [("2", e) for e in each] + [("4", e) for e in each]
    lines = [line | {"partition": name} for name in ("iid", "dirichlet:0.1", "column:bank")]
    assert sweep_report.columns(lines) == [("iid",), ("dirichlet:0.1",), ("column:bank",)]


def told(cell):
    found = {"accuracy": cell.config.privacy.seed / 10, "macro_f1": 0.5}
    return {"metrics": found, "epsilon_max": 1.0, "bytes_up_per_client": 10, "seconds": 0.1}


@pytest.mark.parametrize("index", mostly_slow([], [0, 6]))
def test_a_cell_ends_as_a_run_of_its_flags_does(command, tmp_path, index):
    memo, programs = {}, {}
    cells, _ = sweep_cells.parse(command)
    cell = cells[index]
    name = cell.name
    found = sweep.outcome(cell, memo, programs)
    more = ["--aggregation=fedex"] if name["case"] == "exact" else []
    plain = [word for word in command if not word.startswith(("--out", "--seeds", "--case", "--vary"))]
    folder = tmp_path / name["case"]
    seeds = [f"--epsilon={name['epsilon']}", f"--seed={name['seed']}", f"--split_seed={name['seed']}"]
    fit([*plain, *more, *seeds, f"--workdir={folder}"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert found["metrics"] == {name: lines[-1][name] for name in ("accuracy", "macro_f1")}
    assert found["epsilon_max"] == lines[-1]["epsilon_max"]
    assert (found["of"], found["commonest_label"]) == (f"{cell.config.base.name} on csv", 0.5)
    assert found["release"].startswith("NOT FOR RELEASE")
    if name["case"] == "FedAvg":
        base = sweep.outcome(cell._replace(kind=sweep_cells.BASE), memo, programs)
        assert base["metrics"] == {name: lines[0][name] for name in ("accuracy", "macro_f1")}


@pytest.mark.slow
def test_workers_share_the_cells_and_the_file(command, tmp_path, monkeypatch):
    """Two real processes; each writes its own cells into the one file, and a third start finds nothing to do."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    short = [word for word in command if not word.startswith("--case")] + ["--case=one:"]
    assert sweep.main([*short, "--parallel=2"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert len({sweep_cells.key(line) for line in lines}) == len(lines) == 4
    before = (tmp_path / "cells.jsonl").read_bytes()
    assert sweep.main(short) == 0
    assert (tmp_path / "cells.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "words"),
    [(["--case=nameless"], "needs NAME:"), (["--vary=epsilon"], "malformed"), (["--seeds=x"], "whole numbers")],
)
def test_what_makes_no_cells_is_refused(command, more, words):
    with pytest.raises(InputError, match=words):
        sweep_cells.parse([*command, *more])


def test_options_of_two_words_are_understood(command):
    spaced = [part for word in command for part in word.split("=", 1)]
    assert [cell.config for cell in sweep_cells.parse(spaced)[0]] == [
        cell.config for cell in sweep_cells.parse(command)[0]
    ]
    assert isinstance(sweep_cells.parse(spaced)[0][0].config, RunConfig)
