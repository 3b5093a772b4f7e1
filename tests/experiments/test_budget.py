"""The budget before the run: it finds what a run would find, the largest that fits and no more, and needs no JAX."""

import json
import re
import subprocess
import sys

import pytest

from dplora_jax.privacy import accounting, size_classes
from experiments import budget

SMALL = ("--records=60,200", "--expected_batch_size=12", "--local_steps=2", "--delta=1e-4")


def ask(capsys, *arguments):
    """The answer of `--json` to a command line."""
    capsys.readouterr()
    assert budget.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def spent(sizes, batch, rounds, noise_multiplier):
    """The largest epsilon of SMALL's other flags, as a run has it."""
    mechanisms = accounting.with_noise(sizes, batch, 2 * rounds, noise_multiplier, 1e-4)
    return max(accounting.epsilon(m, 2 * rounds, 1e-4) for m in mechanisms)


def test_the_cost_of_given_noise_is_what_a_run_reports(capsys):
    told = ask(capsys, *SMALL, "--noise_multiplier=1.5", "--rounds=20", "--clip_norm=3")
    assert told["solved"] == "epsilon"
    assert told["epsilon"] == spent((60, 200), 12, 20, 1.5) == max(row["epsilon"] for row in told["clients"])
    for row in told["clients"]:
        assert row["mean_gradient_noise"] == pytest.approx(1.5 * 3 / 12)
        assert row["epsilon"] < row["renyi_epsilon"]
    assert [row["records"] for row in told["clients"]] == [60, 200]
    assert told["curve_rounds"][-1] == 20
    assert all(c["epsilon"] == sorted(c["epsilon"]) for c in told["curves"])
    assert told["curves"][0]["epsilon"][-1] == told["clients"][0]["epsilon"]


def test_the_noise_for_a_budget_is_what_a_run_calibrates(capsys):
    told = ask(capsys, *SMALL, "--epsilon=4", "--rounds=20")
    assert told["solved"] == "noise_multiplier"
    found = accounting.calibrate((60, 200), 12, 40, 4.0, 1e-4)
    assert [row["noise_multiplier"] for row in told["clients"]] == [m.noise_multiplier for m in found]
    assert [row["capacity"] for row in told["clients"]] == [m.capacity for m in found]


def test_sizes_of_one_class_are_told_each_and_shown_together(capsys, monkeypatch):
    """Noise on the mean gradient is by a client's own records: the fewest have the most."""
    monkeypatch.setattr(size_classes, "MOST", 1)
    monkeypatch.setattr(size_classes, "CLASSES", 2)
    flags = (*SMALL, "--noise_multiplier=1.5", "--rounds=20")
    told = ask(capsys, *flags)
    assert [(row["records"], row["sampled_from"], row["sampling_rate"]) for row in told["clients"]] == [
        (60, 200, 12 / 60),
        (200, 200, 12 / 60),
    ]
    assert [row["mean_gradient_noise"] for row in told["clients"]] == pytest.approx([1.5 / 12, 1.5 / 40])
    assert [curve["records"] for curve in told["curves"]] == [60, 200]
    budget.main(list(flags))
    assert "60 to 200" in capsys.readouterr().out


def test_rounds_and_batch_are_the_largest_that_fit(capsys):
    flags = (*SMALL, "--epsilon=4", "--noise_multiplier=1.5")
    rounds = ask(capsys, *flags, "--solve=rounds")["rounds"]
    assert spent((60, 200), 12, rounds, 1.5) <= 4 < spent((60, 200), 12, rounds + 1, 1.5)
    told = ask(capsys, *flags, "--solve=expected_batch_size", "--rounds=10")
    batch = told["expected_batch_size"]
    assert not told["at_end_of_range"]
    assert spent((60, 200), batch, 10, 1.5) <= 4 < spent((60, 200), batch + 1, 10, 1.5)


def test_what_a_capacity_costs_counts_among_the_rounds(capsys):
    """The budget is that of 20 rounds without a capacity: with one, they cost a little more."""
    budget_of_20 = accounting.epsilon(accounting.Mechanism(60, 0.2, 60, 1.5), 40, 1e-4)
    told = ask(capsys, *SMALL, f"--epsilon={budget_of_20!r}", "--noise_multiplier=1.5", "--solve=rounds")
    assert told["rounds"] == 19
    assert max(row["epsilon"] for row in told["clients"]) <= budget_of_20


def test_a_budget_that_all_records_at_once_keep_says_so(capsys):
    told = ask(capsys, *SMALL, "--epsilon=8", "--noise_multiplier=50", "--solve=expected_batch_size", "--rounds=2")
    assert told["at_end_of_range"]
    assert told["expected_batch_size"] == 200


def test_sizes_come_from_the_runs_own_data_and_the_flagfile_counts(capsys, tmp_path, monkeypatch, finance_table):
    (tmp_path / "own.flags").write_text(
        f"--dataset=csv\n--data_dir={finance_table}\n--text_column=text\n--label_column=label\n--partition=column:bank\n"
        "--clients=3\n--epsilon=8\n--rounds=3\n--expected_batch_size=5\n--labels=good,bad\n"
    )
    monkeypatch.chdir(tmp_path)
    told = ask(capsys, "--flagfile=own.flags", "--solve=epsilon", "--noise_multiplier=1")
    assert [(row["records"], row["clients"]) for row in told["clients"]] == [(20, 3)]
    assert told["rounds"] == 3


def test_the_page_for_people_has_answer_table_bars_and_the_papers_bound(capsys, tmp_path):
    figure = tmp_path / "curve.svg"
    assert budget.main([*SMALL, "--noise_multiplier=1.5", "--rounds=20", f"--plot={figure}"]) == 0
    said = capsys.readouterr().out
    assert re.match(r"epsilon [\d.]+ at delta 0.0001 is what 20 rounds of 2 local steps cost", said)
    assert re.search(r"^60 +1 +0\.2 ", said, re.MULTILINE)
    assert "NO GUARANTEE" in said
    assert len(re.findall(r"^ +\d+ █+ ", said, re.MULTILINE)) == 8
    assert "<svg" in figure.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --epsilon"),
        (["--epsilon=1", "--solve=rounds"], "needs --noise_multiplier"),
        (["--noise_multiplier=1", "--solve=noise_multiplier"], "needs --epsilon"),
        (["--epsilon=1", "--noise_multiplier=1", "--rounds=2", "--expected_batch_size=2"], "--solve"),
        (["--epsilon=1", "--solve=sigma"], "--solve=sigma"),
        (["--epsilon=1", "--records=0"], "--records"),
        (["--epsilon=1", "--records=5,many"], "--records"),
        (["--epsilon=1", "--records=5,6", "--clients=3"], "--clients=3"),
        (["--epsilon=inf"], "--trust"),
        (["--epsilon=8", "--trust=distributed"], "Ask for that"),
        (["--epsilon=8", "--trust=client"], "its records are clients"),
        (["--epsilon=8", "--clipping=adaptive"], "plain steps"),
        (["--epsilon=1", "--delta=2"], "--delta"),
        (["--noise_multiplier=0"], "--noise_multiplier"),
        (["--epsilon=1", "--plot=nowhere/at.png"], "--plot"),
        (["--epsilon=0.01", "--noise_multiplier=1", "--solve=rounds"], "out of reach: a single round costs"),
        (["--epsilon=0.01", "--noise_multiplier=1", "--solve=expected_batch_size"], "an expected batch of 1 costs"),
    ],
)
def test_a_mistake_ends_with_one_sentence(capsys, arguments, words):
    records = [] if any(a.startswith("--records") for a in arguments) else ["--records=50"]
    assert budget.main([*records, *arguments]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]*\.\n", said)
    assert words in said


def test_no_jax_is_imported_even_where_sizes_come_from_data():
    code = (
        "import sys; from experiments import budget;"
        "code = budget.main(['--flagfile=finance.flags', '--solve=epsilon', '--noise_multiplier=8', '--rounds=1']);"
        "sys.exit(code or 'jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_budget_is_of_the_rounds_that_a_client_is_in(capsys):
    assert budget.main([*SMALL, "--noise_multiplier=1.5", "--rounds=20", "--clients=2", "--participation=fixed:1"]) == 2
    assert "leave out --participation=fixed:1" in capsys.readouterr().err
