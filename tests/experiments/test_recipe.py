"""What --auto chooses: from public sizes alone, never over a flag that is given, and said."""

import json

import pytest

from dplora_jax.config import field_value, replace
from dplora_jax.finetuning import objectives, recipe
from experiments import budget, cli, run
from tests.experiments.small_runs import fit

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def command(tiny_bert, finance_table, tmp_path):
    return [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=2", "--delta=1e-3", "--auto", "--last_layers=1", f"--workdir={tmp_path / 'run'}",
    ]  # fmt: skip


def test_less_to_hide_in_means_smaller_rates_and_enough_means_full_ones():
    assert recipe.chosen([5000] * 5, 5, 8.0, "classifier")["client_lr"] == pytest.approx(1.0, abs=0.01)
    half = recipe.chosen([425] * 4, 4, 2.0, "classifier")
    assert half["client_lr"] == pytest.approx(0.5)
    assert half["head_lr"] == pytest.approx(4.0)
    assert recipe.chosen([775] * 5, 5, None, "classifier")["client_lr"] == 1.0
    rates = [
        recipe.chosen([n] * k, k, e, "classifier")["client_lr"]
        for n, k, e in ((100, 5, 1.0), (200, 5, 1.0), (200, 5, 2.0))
    ]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


def test_a_head_on_centred_features_goes_further_the_less_noise_there_is():
    rates = [
        recipe.chosen([n] * 5, 5, e, recipe.CENTRED)["head_lr"]
        for n, e in ((382, 2.0), (775, 2.0), (382, 8.0), (775, 8.0))
    ]
    assert rates == pytest.approx([0.25, 0.46, 0.79, 1.27], abs=0.01)  # docs/results/recipe.md
    assert recipe.chosen([775] * 5, 5, None, recipe.CENTRED)["head_lr"] == 3.0


def test_batches_are_a_fifth_of_a_clients_records_and_no_more_than_the_smallest_has():
    assert recipe.chosen([400, 500, 600], 3, 8.0, "classifier")["expected_batch_size"] == 100
    assert recipe.chosen([5, 500, 600], 3, 8.0, "classifier")["expected_batch_size"] == 5
    assert recipe.chosen([10_000], 1, 8.0, "classifier")["expected_batch_size"] == 256
    assert recipe.chosen([20], 1, 8.0, "classifier")["expected_batch_size"] == 8


def test_what_is_given_stays_and_what_is_chosen_is_said(command, capsys):
    config = cli.parse([*command, "--epsilon=2", "--rank=2", "--rounds=3"])
    said = capsys.readouterr().out
    assert said.startswith("--auto chose ")
    assert (config.lora.rank, config.schedule.rounds, config.lora.last_layers) == (2, 3, 1)
    assert "--rank" not in said
    expected = recipe.chosen([30, 30], 2, 2.0, recipe.CENTRED)
    assert f"--client_lr={expected['client_lr']}" in said
    for name in ("expected_batch_size", "client_lr", "head_lr", "clip_norm", "freeze_a", "ema", "feature_norm"):
        assert field_value(config, name) == expected[name]
    assert config.base.feature_norm


def test_without_public_text_no_features_are_centred(command, finance_table, tmp_path):
    (tmp_path / "train.csv").write_text((finance_table / "train.csv").read_text())
    bare = cli.parse([*command, "--epsilon=2", f"--data_dir={tmp_path}", "--labels=good,bad", "--eval_every=0"])
    assert (bare.base.feature_norm, bare.optimizer.head_lr) == (
        0,
        recipe.chosen([30, 30], 2, 2.0, "classifier")["head_lr"],
    )


@pytest.mark.parametrize(("norm", "kind"), [("8", recipe.CENTRED), ("0", "classifier")])
def test_rates_are_of_the_features_that_are_asked_for(command, finance_table, tmp_path, norm, kind):
    (tmp_path / "train.csv").write_text((finance_table / "train.csv").read_text())
    bare = [*command, "--epsilon=2", f"--feature_norm={norm}", f"--data_dir={tmp_path}"]
    without = cli.parse([*bare, "--labels=good,bad", "--eval_every=0"])
    (tmp_path / "test.csv").write_text((finance_table / "test.csv").read_text())
    assert without.optimizer.head_lr == cli.parse(bare).optimizer.head_lr
    assert without.optimizer.head_lr == recipe.chosen([30, 30], 2, 2.0, kind)["head_lr"]


def test_other_records_of_the_same_sizes_choose_the_same(command, finance_table, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    rows = (finance_table / "train.csv").read_text().splitlines()
    (other / "train.csv").write_text("\n".join([rows[0], *rows[:0:-1][:30], *rows[1:31]]) + "\n")
    (other / "test.csv").write_text((finance_table / "test.csv").read_text())
    plain, changed = (cli.parse([*command, "--epsilon=8", f"--data_dir={d}"]) for d in (finance_table, other))
    assert replace(changed, data_dir=plain.data.data_dir) == plain


@pytest.mark.slow
def test_a_run_of_it_goes_through_and_is_found_finished(command, tmp_path, capsys):
    args = [*command, "--epsilon=8", "--rounds=2"]
    fit(args)
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    assert told["ema"] == 0.8
    assert run.main(args) == 0
    assert "finished" in capsys.readouterr().out


def test_it_goes_by_what_the_run_will_be(command):
    """No privacy is no reason for small rates, whatever budget stands in the flagfile; nor has every aggregation a frozen A."""
    bare = cli.parse([*command, "--epsilon=2", "--trust=none"])
    assert bare.optimizer.client_lr == 1.0
    unclipped = cli.parse([*command, "--trust=none", "--clip_norm=inf"])
    assert (unclipped.base.feature_norm, unclipped.optimizer.head_lr) == (0, 8.0)
    own = cli.parse([*command, "--epsilon=8", "--head_lr=3"])
    assert (own.base.feature_norm, own.optimizer.head_lr) == (0, 3.0), (
        "features were scaled under a rate that was not chosen for it"
    )
    assert not cli.parse([*command, "--epsilon=8", "--aggregation=rolora", "--local_steps=1"]).lora.freeze_a
    deep = [word for word in command if not word.startswith("--last_layers")]
    assert cli.parse([*deep, "--epsilon=8"]).lora.last_layers == 2  # as many as the model has


def test_a_language_model_that_says_labels_trains_a_core_where_there_is_public_text(command, monkeypatch):
    monkeypatch.setattr(objectives, "kind", lambda *_: objectives.LANGUAGE_MODEL)
    config = cli.parse([*command, "--epsilon=8"])
    assert (config.lora.core, config.lora.freeze_a) == (True, False)
    assert config.lora.targets == ("q", "o", "up")  # BERT has no gate


def test_what_a_core_is_trained_by_is_what_was_measured():
    words = [recipe.chosen([775] * 5, 5, epsilon, recipe.WORDS) for epsilon in (2.0, 8.0, None)]
    assert [chosen["client_lr"] for chosen in words] == [29.7, 49.7, 64.0]  # docs/results/recipe.md
    tuned = {"rounds": 20, "lr_decay": 0.1, "last_layers": 12, "rank": 16, "alpha": 16.0, "clip_norm": 0.5, "ema": 0.5}
    tuned["server_momentum"] = 0.5
    assert words[1].items() >= tuned.items()


@pytest.mark.parametrize("kind", [objectives.CLASSIFIER, objectives.LANGUAGE_MODEL])
def test_what_is_said_can_be_given_as_flags(command, monkeypatch, capsys, kind):
    monkeypatch.setattr(objectives, "kind", lambda *_: kind)
    config = cli.parse([*command, "--epsilon=8"])
    said = capsys.readouterr().out.removeprefix("--auto chose ").split()
    assert not any(word.endswith("=None") for word in said)
    again = cli.parse([*(word for word in command if word != "--auto"), "--epsilon=8", *said])
    assert again == replace(config, auto=False)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("--aggregation=rolora --local_steps=1", "since aggregation=rolora has none"),
        ("--data_dir={few}", "since there are fewer than 20 public test records"),
        ("--client_lr=40", "since what is right for `client_lr` is another with a core"),
        ("--nocore", "since core=false is given"),
    ],
)
def test_why_label_words_get_no_core_is_said(command, finance_table, monkeypatch, tmp_path, more, why):
    monkeypatch.setattr(objectives, "kind", lambda *_: objectives.LANGUAGE_MODEL)
    write_few(finance_table, tmp_path)
    with pytest.warns(UserWarning, match=why):
        config = cli.parse([*command, "--epsilon=8", *more.format(few=tmp_path).split()])
    assert not config.lora.core
    assert config.lora.targets == ("q", "v")


def write_few(finance_table, folder):
    """The table with 19 public test records."""
    for name, lines in (("train.csv", 61), ("test.csv", 20)):
        rows = (finance_table / name).read_text().splitlines()
        (folder / name).write_text("\n".join(rows[:lines]))


def test_a_core_that_is_asked_for_takes_a_rate_that_is_given_and_few_public_records(
    command, finance_table, tmp_path, monkeypatch
):
    monkeypatch.setattr(objectives, "kind", lambda *_: objectives.LANGUAGE_MODEL)
    write_few(finance_table, tmp_path)
    config = cli.parse([*command, "--epsilon=8", "--core", "--client_lr=40", f"--data_dir={tmp_path}"])
    assert (config.optimizer.client_lr, config.lora.rank, config.schedule.rounds) == (40, 16, 20)


def test_commands_that_read_no_records_ask_for_the_choices(command, capsys):
    assert budget.main([*command, "--epsilon=8"]) == 2
    assert "give the flags that the run says" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--epsilon=none --noise_multiplier=1", "needs --epsilon"),
        ("--partition=folders", "no process knows"),
        ("--trust=distributed", "--trust=distributed"),
    ],
)
def test_where_it_knows_nothing_it_says_so(command, more, words, capsys):
    assert run.main([*command, "--epsilon=8", *more.split()]) == 2
    assert words in capsys.readouterr().err


def test_people_count_and_not_their_rows(command):
    """Three banks' rows are three units, of whose rows a step takes a few."""
    config = cli.parse([*command, "--epsilon=8", "--privacy_unit=column:bank"], lambda _: None)
    assert config.privacy.unit_rows == recipe.UNIT_ROWS
    assert config.schedule.expected_batch_size == 1
    given = cli.parse([*command, "--epsilon=8", "--privacy_unit=column:bank", "--unit_rows=2"], lambda _: None)
    assert given.privacy.unit_rows == 2
