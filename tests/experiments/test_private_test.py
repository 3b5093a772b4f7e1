"""Scores on private records as a person meets them: the report says what is what, and the ledger what it costs."""

import contextlib
import io
import json
import math

import pytest

from dplora_jax.errors import InputError
from dplora_jax.federation import calibration, held_out
from dplora_jax.federation.workdir_files import write_config
from dplora_jax.privacy import accounting
from dplora_jax.privacy.ledger import Ledger, describe
from experiments import audit, budget, cli, ledger, run, sweep
from experiments.text import scores
from tests.experiments import ledger_workdirs as made
from tests.experiments.small_runs import arguments, fit, lines_of

pytestmark = pytest.mark.usefixtures("quick_compile")
SHARE = "--private_test=0.3"
CONFIG = cli.settle(cli.replace(made.CONFIG, private_test=0.1, private_test_epsilon=6.0, eval_every=2))
UNITS = [11, 6]


@pytest.fixture(scope="module")
def alone(finance_table, tmp_path_factory):
    """A folder with a private table and no public one."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "train.csv").write_bytes((finance_table / "train.csv").read_bytes())
    return folder


def flags(tiny_bert, table, place):
    return [*arguments(tiny_bert, table, place), "--labels=good,bad", SHARE]


@pytest.fixture(scope="module")
def done(tiny_bert, alone, tmp_path_factory):
    """(workdir, what it said) of a run that ended."""
    place, out = tmp_path_factory.mktemp("done"), io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run.main(flags(tiny_bert, alone, place)) == 0
    return place / "run", out.getvalue()


def test_a_run_needs_no_public_test_set(done):
    folder, said = done
    lines = lines_of(folder / "metrics.jsonl")
    assert [line["round"] for line in lines if "private_accuracy" in line] == [0, 2, 4, 6]
    assert not any("accuracy" in line for line in lines)
    for line in lines[::2]:
        for name in ("private_accuracy", "private_macro_f1"):
            assert 0 <= line[f"{name}_low"] <= line[name] <= line[f"{name}_high"] <= 1
    assert "accuracy on private records" in said
    assert "noisy, 18 records" in said
    assert "for every client's records that train, and 8.00 for those that are kept back" in said


def test_the_report_says_what_is_private_and_what_a_record_pays(done):
    folder, _ = done
    for name in ("report.html", "report.md"):
        text = (folder / name).read_text()
        assert "PRIVATE: accuracy, macro-F1 are noisy, on 18 private records that never train" in text
        assert "PUBLIC" not in text
        assert "so no record has paid more than 8.00" in text
        assert "18 records are kept back, drawn by each client" in text.replace("&#39;", "'")
    assert "Bands are 95 % intervals." in (folder / "report.html").read_text()
    assert "noisy counts on 18 records that never train" not in (folder / "adapter" / "README.md").read_text()
    assert "18 kept back" in (folder / "report.html").read_text()


def test_public_and_private_scores_stand_side_by_side(tiny_bert, finance_table, tmp_path):
    place = tmp_path / "both"
    fit([*flags(tiny_bert, finance_table, place), "--rounds=2"])
    from experiments import report

    text = report.write(place / "run").with_name("report.md").read_text()
    assert (
        "| round | epsilon | accuracy | macro-F1 | accuracy on private records | macro-F1 on private records |" in text
    )
    assert "PUBLIC: accuracy, macro-F1 are exact, on 30 records whose owner declares them public." in text


def test_without_privacy_scores_are_called_exact(tiny_bert, alone, tmp_path):
    fit([*flags(tiny_bert, alone, tmp_path), "--rounds=2", "--epsilon=inf"])
    from experiments import report

    text = report.write(tmp_path / "run").with_name("report.md").read_text()
    assert "EXACT, NOT PRIVATE: accuracy, macro-F1, on 18 private records that never train." in text
    assert "noisy" not in text
    assert ledger.main(["verify", str(tmp_path / "run")]) == 0


def test_show_prints_the_evaluations_and_verify_holds(done, capsys):
    folder, _ = done
    code, said, _ = made.run(capsys, "show", folder)
    assert code == 0
    assert "4 evaluations on records that are kept back charged" in said
    assert "never for both: at most 8.00" in said or "never for both: at most 7.99" in said
    assert ledger.main(["verify", str(folder)]) == 0


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--private_test=0.01"], "leaves none to be measured on"),
        (["--private_test=0.99"], "leaves none to train on"),
        (["--eval_every=0"], "--private_test"),
        (["--trust=client", "--local_steps=1"], "--trust=client"),
        (["--private_test=0", "--private_test_epsilon=1"], "--private_test_epsilon"),
        (["--private_test=1"], "--private_test"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(tiny_bert, alone, tmp_path, capsys, extra, words):
    assert run.main([*flags(tiny_bert, alone, tmp_path), *extra]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run" / "privacy_ledger.jsonl").exists(), "something was charged"


def test_sweeps_and_audits_refuse_it_by_name(tiny_bert, alone, tmp_path, capsys):
    told = flags(tiny_bert, alone, tmp_path)
    assert sweep.main([*told, f"--out={tmp_path / 'sweep.jsonl'}"]) == 2
    assert "--private_test cannot be used in a sweep" in capsys.readouterr().err
    assert audit.main([*told, "--runs=1"]) == 2
    assert "--private_test=0.3" in capsys.readouterr().err


def test_a_budget_shows_what_the_records_that_are_kept_back_pay(capsys):
    assert (
        budget.main(
            ["--records=1000", "--clients=2", "--rounds=20", "--epsilon=8", "--private_test=0.1", "--eval_every=5"]
        )
        == 0
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "900 2" in said, "records that train"
    assert "200 more records never train: 5 evaluations with sigma 1.342 cost each of them epsilon 8.00 in all" in said


def scored_run(folder):
    """A run of two clients that is scored three times, as the program leaves it, with its secrets -> its working directory."""
    mechanisms = calibration.mechanisms(CONFIG, [100, 50])
    cost = held_out.cost(CONFIG, UNITS)
    planned = [accounting.epsilon(m, 8, made.DELTA) for m in mechanisms]
    rows = [describe(m) | {"client": k, "epsilon": e} for k, (m, e) in enumerate(zip(mechanisms, planned, strict=True))]
    write_config(folder, CONFIG, {"clients": rows, "release": "for release", "private_test": cost._asdict()})
    from dplora_jax.federation import workdir_files

    said = {"release": "for release", "trust": "local", "delta": made.DELTA}
    said["config"] = workdir_files.read_config(folder).digest
    kept = Ledger(folder / "privacy_ledger.jsonl")
    kept.seal_with(b"".join(made.SECRETS))
    inputs = {"data": "d0", "base": "b0"}
    lines = []
    for number, steps in (0, 0), (2, 4), (4, 8):
        if number:
            kept.begin((number - 1, number + 1), 0, mechanisms, 2, inputs, **said)
            half = [accounting.epsilon(m, steps - 2, made.DELTA, 1e-2) for m in mechanisms]
            lines.append({"round": number - 1, "epsilon": half, "epsilon_max": max(half)})
        kept.evaluate(number, 0, cost.noise_multiplier, inputs, **said)
        spent = [accounting.epsilon(m, steps, made.DELTA) for m in mechanisms]
        lines.append(
            {"round": number, "epsilon": spent, "epsilon_max": max(spent), "private_accuracy": 0.6}
            | {held_out.SPENT: kept.test_epsilon(made.DELTA)}
        )
        if number:
            kept.commit((number - 1, number + 1), 0)
    kept.append(entry="end", round=4)
    made.write_lines(folder, lines)
    (folder / "private").mkdir()
    (folder / "private" / "secrets.json").write_text(json.dumps([secret.hex() for secret in made.SECRETS]))
    return folder


def evaluations(change):
    """A change of each evaluate entry."""
    return lambda folder: made.reforge(folder, lambda e: change(e) if e["entry"] == "evaluate" else e)


def line(number, **values):
    def change(lines):
        lines[number].update(values)

    return lambda folder: made.edit_lines(folder, change)


def planned(**values):
    def change(folder):
        made.edit(folder / "config.json", lambda c: c["federation"]["private_test"].update(values))
        made.reforge(folder, lambda e: {k: v for k, v in e.items() if k != "config"} if e["entry"] == "begin" else e)

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: None, ""),
        (evaluations(lambda e: e | {"noise_multiplier": 9.0}), "has other noise_multiplier"),
        (evaluations(lambda e: e | {"delta": 1e-4}), "has other delta"),
        (evaluations(lambda e: e | {"release": "NO PRIVACY"}), "has other release"),
        (evaluations(lambda e: e | {"round": e["round"] + 5}), "has other round"),
        (
            evaluations(lambda e: None if e["round"] == 2 else e),
            "shows private_accuracy of round 2, which was never charged",
        ),
        (evaluations(lambda e: e | {"round": 0}), "under keys that an earlier entry used"),
        (
            evaluations(lambda e: {k: v for k, v in e.items() if k != "config"}),
            "is not an entry that this version knows",
        ),
        (line(2, private_test_epsilon=0.1), "shows less private_test_epsilon in round 2 than was charged"),
        (line(1, private_accuracy=0.9), "shows private_accuracy of round 1, which was never charged"),
        (planned(units=[5, 6]), "does not follow from its fields and sizes"),
        (planned(noise_multiplier=0.5), "does not follow from its fields and sizes"),
        (planned(epsilon=1.0), "does not follow from its fields and sizes"),
        (planned(evaluations=2), "does not follow from its fields and sizes"),
    ],
)
def test_a_ledger_of_evaluations_that_was_changed_does_not_hold(tmp_path, capsys, damage, words):
    scored_run(tmp_path)
    damage(tmp_path)
    code, said, error = made.run(capsys, "verify", tmp_path)
    assert (code == 2) == bool(words), said
    assert words in error


def test_more_evaluations_than_were_planned_do_not_hold(tmp_path, capsys):
    scored_run(tmp_path)
    made.unfinished(tmp_path)
    kept = Ledger(tmp_path / "privacy_ledger.jsonl")
    kept.seal_with(b"".join(made.SECRETS))
    last = {k: v for k, v in kept.evaluated[-1].items() if k not in ("previous", "seal", "entry")}
    kept.append(entry="evaluate", **last | {"attempt": 1})
    code, _, error = made.run(capsys, "verify", tmp_path)
    assert code == 2
    assert "it plans 3 evaluations, and 4 were charged" in error


def test_scores_that_nothing_is_kept_back_for_do_not_hold(tmp_path, capsys):
    made.write_run(tmp_path)
    made.unfinished(tmp_path)
    kept = Ledger(tmp_path / "privacy_ledger.jsonl")
    kept.seal_with(b"".join(made.SECRETS))
    said = {"trust": "local", "delta": made.DELTA, "release": "for release", "config": "00"}
    kept.evaluate(4, 0, 1.0, {"data": "d0", "base": "b0"}, **said)
    code, _, error = made.run(capsys, "verify", tmp_path)
    assert code == 2
    assert "nothing is kept back" in error


def test_ledgers_know_what_scores_cost(tmp_path):
    kept = Ledger(scored_run(tmp_path) / "privacy_ledger.jsonl")
    assert kept.test_epsilon(made.DELTA) == pytest.approx(6.0, rel=1e-3)
    assert max(kept.epsilons(made.DELTA)) > 7.9
    assert not math.isclose(kept.test_epsilon(made.DELTA), max(kept.epsilons(made.DELTA)), rel_tol=0.1)


def test_words_of_scores():
    row = {"private_perplexity": 12.5, "private_perplexity_low": 9.0, "private_perplexity_high": 17.0, "accuracy": 0.5}
    assert scores.private(row) == ["perplexity on private records 12.5 (9.00 to 17)"]
    assert scores.public(row) == ["accuracy 0.500"]
    assert scores.span(row, "accuracy") == ""
    with pytest.raises(InputError, match="eval_every"):
        cli.settle(cli.replace(CONFIG, eval_every=0))
