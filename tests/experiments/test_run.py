"""The main job as a person runs it: its files, its figures, its refusals."""

import contextlib
import io
import json
import stat

import numpy as np
import pytest

import experiments.report
from dplora_jax import checkpoint, models
from dplora_jax.errors import InputWarning
from dplora_jax.federation import clock
from dplora_jax.finetuning import public_tests, setup
from dplora_jax.privacy import accounting
from dplora_jax.privacy.ledger import Ledger, rebuild
from experiments import cli, ledger, run
from tests.experiments.small_runs import adapter_of, arguments, fit, lines_of, strict_json_files

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def command(tiny_bert, finance_table, tmp_path):
    return arguments(tiny_bert, finance_table, tmp_path)


@pytest.fixture(scope="module")
def done(tiny_bert, finance_table, tmp_path_factory):
    """(command, its workdir, what it said) of a run that ended."""
    place = tmp_path_factory.mktemp("done")
    command, out, err = arguments(tiny_bert, finance_table, place), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert run.main(command) == 0
    assert err.getvalue() == ""
    return command, place / "run", out.getvalue()


def test_run_leaves_what_the_contract_names(done):
    _, folder, said = done
    assert "epsilon" in said
    assert str(folder / "adapter") in said
    lines = lines_of(folder / "metrics.jsonl")
    assert [line["round"] for line in lines] == list(range(7))
    assert [line["round"] for line in lines if "accuracy" in line] == [0, 2, 4, 6]
    assert all(len(line["epsilon"]) == 3 for line in lines)
    assert lines[-1]["epsilon_max"] <= 8
    assert lines[-1]["epsilon_max"] > 7.9
    config = json.loads((folder / "config.json").read_text())
    assert config["rank"] == 2
    assert config["epsilon"] == 8
    assert config["federation"]["base_files"] == models.file_digests(config["model"])
    assert set(adapter_of(folder)) >= {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert stat.S_IMODE((folder / "private").stat().st_mode) == 0o700
    assert list((folder / "private").iterdir()) == [], "secrets outlived the run"
    assert [name for name, _ in checkpoint.anchors(folder / "checkpoints")] == ["checkpoint 4", "checkpoint 6"]
    assert ledger.main(["verify", str(folder)]) == 0
    report = (folder / "report.html").read_text()
    assert "Ledger: 3 dispatches begun, 3 committed; 6 rounds charged; the chain holds against" in report
    experiments.report.write(folder)
    assert (folder / "report.html").read_text() == report, "the entry that ends the run changed its report"


def test_epsilon_shown_is_the_ledgers_own(done):
    _, folder, _ = done
    kept = Ledger(folder / "privacy_ledger.jsonl")
    assert lines_of(folder / "metrics.jsonl")[-1]["epsilon"] == pytest.approx(kept.epsilons(1e-3))
    mechanism = rebuild(kept.entries[0]["clients"][0])
    assert accounting.epsilon(mechanism, 12, 1e-3) == pytest.approx(kept.epsilons(1e-3)[0])


def test_finished_run_says_so_and_does_nothing(done, capsys):
    command, folder, _ = done
    times = lambda: {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}  # noqa: E731
    before = times()
    assert run.main(command) == 0
    assert "finished" in capsys.readouterr().out
    assert before == times()


def test_other_configuration_is_refused_by_name(done, capsys):
    command, *_ = done
    assert run.main([*command, "--rank=3", "--delta=1e-4"]) == 2
    said = capsys.readouterr().err
    assert "--rank" in said
    assert "--delta" in said


def test_seed_repeats_the_run_and_marks_it(command, done, tmp_path, capsys):
    assert run.main([*command, "--seed=3", f"--workdir={tmp_path / 'first'}"]) == 0
    assert "NOT FOR RELEASE" in capsys.readouterr().out
    fit([*command, "--seed=3", f"--workdir={tmp_path / 'second'}"])
    first, second = adapter_of(tmp_path / "first"), adapter_of(tmp_path / "second")
    assert all(np.array_equal(first[name], second[name]) for name in first)
    for name in ("report.html", "config.json", "metrics.jsonl", "privacy_ledger.jsonl", "adapter/README.md"):
        assert "NOT FOR RELEASE" in (tmp_path / "first" / name).read_text(), name
    unseeded = adapter_of(done[1])
    assert not np.array_equal(
        first["base_model.model.classifier.weight"], unseeded["base_model.model.classifier.weight"]
    )


@pytest.mark.slow
def test_frozen_layers_may_run_once_a_record_or_at_each_step(command, tmp_path):
    for name in ("cache_frozen", "nocache_frozen"):
        fit([*command, "--seed=3", "--last_layers=1", f"--{name}", f"--workdir={tmp_path / name}"])
    once, each = adapter_of(tmp_path / "cache_frozen"), adapter_of(tmp_path / "nocache_frozen")
    assert all(np.allclose(once[name], each[name], atol=1e-5) for name in each)
    assert np.abs(each["base_model.model.classifier.weight"]).max() > 1e-2


def test_trust_none_says_so_and_costs_infinity(command, tmp_path, capsys):
    assert run.main([*command, "--epsilon=inf", "--clip_norm=inf", "--private_diagnostics"]) == 0
    assert "NO PRIVACY" in capsys.readouterr().out
    assert lines_of(tmp_path / "run" / "metrics.jsonl")[-1]["epsilon_max"] == "inf"
    for name in ("metrics.jsonl", "privacy_ledger.jsonl", "adapter/README.md"):
        assert "NO PRIVACY" in (tmp_path / "run" / name).read_text(), name
    assert "no privacy" in (tmp_path / "run" / "report.html").read_text().lower()
    written = {
        "config.json",
        "metrics.jsonl",
        "privacy_ledger.jsonl",
        "diagnostics.jsonl",
        "metadata",
        "adapter_config.json",
    }
    assert written <= set(strict_json_files(tmp_path / "run"))  # infinite as its epsilon and its clip norm are


def test_all_evaluation_counts_as_work_and_not_as_waiting(command, monkeypatch):
    busy, inside = [], []

    @contextlib.contextmanager
    def counted(made, name):
        busy.append(name)
        yield
        busy.pop()

    monkeypatch.setattr(clock.Clock, "part", counted)
    evaluator = public_tests.evaluator

    def overheard(*arguments):
        measure = evaluator(*arguments)
        return lambda *args, **options: (inside.append(busy[-1] in clock.BUSY), measure(*args, **options))[1]

    monkeypatch.setattr(public_tests, "evaluator", overheard)
    fit(command)
    assert inside == [True] * 4, "the base model, and every second of six rounds"


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--model=no/such-model"], "hub"),
        (["--dataset=nothing"], "nothing"),
        (["--text_column=body"], "body"),
        (["--labels=good,fine"], "label"),
        (["--clients=61"], "61"),
        (["--partition=column:bank", "--clients=4"], "bank"),
        (["--partition=sideways"], "sideways"),
        (["--epsilon=2000"], "--epsilon"),
        (["--epsilon=none", "--noise_multiplier=1", "--delta=1e-17"], "--delta"),
        (["--prompt_column=text"], "--prompt_column"),
        (["--mesh=1x3"], "--mesh"),
        (["--mesh=99x1"], "99"),
        (["--max_length=99"], "--max_length"),
        (["--targets=z"], "'z'"),
        (["--last_layers=9"], "last_layers"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(command, tmp_path, capsys, monkeypatch, extra, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run.main([*command, *extra]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run" / "privacy_ledger.jsonl").exists(), "something was charged"


def test_missing_public_test_set_is_refused_unless_never_evaluated(command, finance_table, tmp_path, capsys):
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "train.csv").write_bytes((finance_table / "train.csv").read_bytes())
    without = [*command, f"--data_dir={alone}", "--labels=good,bad"]
    assert run.main(without) == 2
    assert "--eval_every=0" in capsys.readouterr().err
    setup.prepare(cli.parse([*without, "--eval_every=0"]))


def test_corrupt_weights_are_refused(command, tiny_bert, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_bert.iterdir():
        data = path.read_bytes()
        (broken / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    assert run.main([*command, f"--model={broken}"]) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_rank_above_a_matrixs_own_size_is_a_warning(command):
    job = setup.prepare(cli.parse([*command, "--rank=20"]))
    with pytest.warns(InputWarning, match="rank 20"):
        job.federation.prepare(job.shards)


def test_clients_of_unequal_sizes_have_their_own_rates(command):
    job = setup.prepare(cli.parse([*command, "--partition=dirichlet:0.5"]))
    clients = job.federation.plan([len(shard["labels"]) for shard in job.shards]).clients
    assert len({client.records for client in clients}) > 1
    assert all(client.sampling_rate == min(1, 8 / client.records) for client in clients)
    assert all(7.9 < client.epsilon <= 8 for client in clients)
