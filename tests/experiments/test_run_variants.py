"""Runs with adaptive clipping and with correlated noise: what they say, what they cost, and how they go on."""

import json

import pytest

from dplora_jax.errors import InputError
from dplora_jax.federation.federation import Federation
from dplora_jax.privacy import ledger
from dplora_jax.privacy.ledger import Ledger
from experiments import cli
from tests.experiments.small_runs import crash_before, fit, lines_of

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def command(tiny_bert, finance_table):
    return [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=2", "--rounds=4", "--expected_batch_size=8", "--rank=2", "--epsilon=8", "--delta=1e-3",
        "--client_lr=0.1", "--head_lr=1", "--eval_every=0",
        "--dispatch_rounds=2", "--seed=3",
    ]  # fmt: skip


def test_adaptive_clip_norms_are_released_charged_and_kept_in_the_checkpoint(command, tmp_path, monkeypatch):
    command, folder = [*command, "--clipping=adaptive", f"--workdir={tmp_path / 'run'}"], tmp_path / "run"
    with monkeypatch.context() as patch:
        crash_before(patch, Federation, "_finish")
        with pytest.raises(KeyboardInterrupt):
            fit(command)
    fit(command)
    shown = [line["clip_norm"] for line in lines_of(folder / "metrics.jsonl") if "clip_norm" in line]
    assert len(shown) == 2
    assert all(len(norms) == 2 and norms[0] != norms[1] for norms in shown)
    book = Ledger(folder / "privacy_ledger.jsonl")
    assert ledger.rebuild(book.entries[0]["clients"][0]).count_noise > 0
    assert 7.9 < book.epsilons(1e-3)[0] <= 8
    assert "Andrew et al. 2021" in json.loads((folder / "config.json").read_text())["federation"]["method"][0]


def test_banded_run_spends_its_budget_and_says_how(command, tmp_path):
    workdir = tmp_path / "run"
    fit([*command, "--noise=banded", "--local_steps=2", "--rounds=2", f"--workdir={workdir}"])
    book = Ledger(workdir / "privacy_ledger.jsonl")
    assert ledger.rebuild(book.entries[0]["clients"][0]).bands == 2
    assert lines_of(workdir / "metrics.jsonl")[-1]["epsilon"] == pytest.approx(book.epsilons(1e-3))
    assert 7.9 < book.epsilons(1e-3)[0] <= 8
    method = json.loads((workdir / "config.json").read_text())["federation"]["method"]
    assert any("correlated over 2 local steps" in line for line in method)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--clipping=soft"], "flat, per_layer, automatic or adaptive"),
        (["--clipping=adaptive", "--clip_quantile=1"], "--clip_quantile"),
        (["--clipping=adaptive", "--clip_rate=0"], "--clip_rate"),
        (["--clipping=adaptive", "--clip_rate=1000"], "--clip_rate"),
        (["--clip_norm=1e-24"], "--clip_norm=1e-24 must lie in 1e-06 to 1e[+]06"),
        (["--clipping=adaptive", "--count_noise_multiplier=0"], "--count_noise_multiplier"),
        (["--count_noise_multiplier=3"], "belongs to --clipping=adaptive"),
        (["--clipping=automatic", "--clip_norm=inf", "--epsilon=inf"], "finite --clip_norm"),
        (["--noise=pink"], "independent, banded, banded_rounds or hardened"),
        (["--noise=banded"], "--local_steps"),
        (["--noise=banded", "--local_steps=4", "--bands=3"], "dividing --local_steps=4"),
        (["--noise=banded", "--local_steps=4", "--bands=1"], "--bands of 2 or more"),
        (["--noise=banded", "--local_steps=2", "--clipping=adaptive"], "exclude each other"),
        (["--noise=banded", "--local_steps=2", "--epsilon=inf"], "cannot be used with --trust=none"),
        (["--bands=2"], "belongs to --noise=banded"),
    ],
)
def test_mistake_is_one_sentence_that_names_the_flag(argv, words):
    with pytest.raises(InputError, match=words) as caught:
        cli.parse(["--epsilon=8", *argv])
    assert "\n" not in str(caught.value)
