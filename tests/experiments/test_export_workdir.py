"""An export of a run's workdir: what it takes from config.json, and what it says where the ledger does not confirm it."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest

from dplora_jax import lora, models, peft
from dplora_jax.config import replace
from dplora_jax.federation import trust, workdir_files
from dplora_jax.finetuning import setup
from dplora_jax.privacy import secrets
from dplora_jax.privacy.ledger import Ledger
from experiments import cli, export
from experiments.run import summary
from experiments.text import formats
from tests import exported
from tests.experiments.test_export import logits_of, read_back, refusal


@pytest.fixture(scope="module")
def finished(tiny_bert, finance_table, tmp_path_factory):
    """A run's workdir as it is in the end, with a seed, A frozen and three labels, but with an adapter that was drawn."""
    folder = tmp_path_factory.mktemp("run") / "finance"
    config = cli.parse(
        [
            f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text",
            "--label_column=label", "--max_length=8", "--clients=2", "--rounds=1", "--rank=2", "--alpha=6", "--freeze_a",
            "--labels=good,bad,unclear", "--noise_multiplier=2", "--delta=1e-3", "--eval_every=0", "--seed=1",
            f"--workdir={folder}",
        ]
    )  # fmt: skip
    job = setup.prepare(config)
    prepared = job.federation.prepare(job.shards)
    folder.mkdir()
    charge(folder, config, job.federation.describe(job.describe), prepared.mechanisms)
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.2, leaf.shape), jax.device_get(prepared.state.adapter))
    adapter = lora.with_frozen(prepared.params, trained)
    peft.save(folder / "adapter", prepared.model, jax.tree.map(np.float32, adapter), prepared.lora_config)
    (folder / "adapter" / "README.md").write_text(summary.line(folder))
    return folder


def charge(folder, config, facts, mechanisms):
    """Write config.json, ledger and metrics of one round."""
    workdir_files.write_config(folder, config, facts)
    ledger, spent = Ledger(folder / "privacy_ledger.jsonl"), [row["epsilon"] for row in facts["clients"]]
    if config.privacy.seed is not None:
        ledger.seal_with(b"".join(secrets.from_seed(config.privacy.seed, config.schedule.clients)))
    ledger.begin((1, 2), 0, mechanisms, trust.mode(config).steps_per_round(config), {})
    ledger.commit((1, 2), 0)
    lines = [(0, [0.0] * len(spent)), (1, spent)]
    workdir_files.write_metrics(folder, [{"round": t, "epsilon": e, "epsilon_max": max(e)} for t, e in lines])


def altered(finished, folder, **changes):
    """A copy of the workdir whose config.json has other values; those of "release" lie under "federation"."""
    shutil.copytree(finished, folder)
    said = json.loads((folder / "config.json").read_text())
    if "release" in changes:
        said["federation"]["release"] = changes.pop("release")
    (folder / "config.json").write_text(json.dumps(said | changes))
    return folder


def without_privacy(finished, folder):
    """A copy of the workdir as that of a run without privacy."""
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("privacy_ledger.*"))
    stored = workdir_files.read_config(folder)
    config = replace(stored.config, trust="none", noise_multiplier=None)
    silent = [dataclasses.replace(mechanism, noise_multiplier=0.0) for mechanism in stored.mechanisms]
    rows = [row | {"noise_multiplier": 0.0, "epsilon": math.inf} for row in stored.description["clients"]]
    charge(folder, config, stored.description | {"clients": rows, "release": None}, silent)
    return folder


def test_a_workdir_tells_base_labels_length_and_budget(finished, tiny_bert, tmp_path):
    out = tmp_path / "out"
    assert export.main([f"--workdir={finished}", f"--out={out}"]) == 0
    assert list(json.loads((out / "config.json").read_text())["label2id"]) == ["good", "bad", "unclear"]
    assert json.loads((out / "sentence_bert_config.json").read_text())["max_seq_length"] == 8
    card = (out / "README.md").read_text()
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    for client, epsilon in enumerate(last["epsilon"]):
        assert f"| {client} | 30 | {formats.epsilon(epsilon)} |" in card
    assert "epsilon at delta 0.001" in card
    assert "A frozen (FFA-LoRA)" in card
    assert str(tiny_bert.parent) not in card, "a path of this machine's is in the card"
    model, params = models.from_pretrained(tiny_bert, num_labels=3)
    adapter, _ = peft.load(finished / "adapter", model, params)
    batch = models.load_tokenizer(out)(exported.TEXTS, padding=True, return_tensors="np")
    expected = logits_of(model, params, batch, adapter)
    np.testing.assert_allclose(logits_of(*read_back(out), batch), expected, atol=2e-5)
    assert np.abs(logits_of(model, params | {"head": adapter["head"]}, batch) - expected).max() > 1e-3


def test_the_export_carries_the_runs_word_on_its_release(finished, tmp_path, capsys):
    runs = {
        "NOT FOR RELEASE: a seed": finished,
        "for release": altered(finished, tmp_path / "unseeded", release="for release", seed=None),
        "NO PRIVACY": without_privacy(finished, tmp_path / "bare"),
    }
    for mark, folder in runs.items():
        out = tmp_path / mark
        assert export.main([f"--workdir={folder}", f"--out={out}"]) == 0
        card = (out / "README.md").read_text()
        assert f"**Release: {mark}" in card
        assert f"Release: {mark}" in capsys.readouterr().out
        private = mark != "NO PRIVACY"
        assert ("epsilon at delta" in card, "differential-privacy" in card) == (private, private)
        assert "Do not rely" not in card


@pytest.mark.parametrize("changes", [{"release": "for release"}, {"delta": 1e-9}, {"noise_multiplier": 3.0}])
def test_what_the_ledger_does_not_confirm_is_not_for_release(finished, tmp_path, changes):
    out = tmp_path / "out"
    assert export.main([f"--workdir={altered(finished, tmp_path / 'run', **changes)}", f"--out={out}"]) == 0
    card = (out / "README.md").read_text()
    assert "**Release: NOT FOR RELEASE. The ledger does not confirm this run" in card
    assert "**Do not rely on these figures.**" in card
    assert "differential-privacy" not in card
    assert "epsilon at delta" not in card


def test_the_line_that_a_run_ends_with_says_that_its_ledger_does_not_confirm_it(finished, tmp_path):
    assert "NOT FOR RELEASE (--seed)." in summary.line(finished)
    assert "DO NOT RELY" not in summary.line(finished)
    folder = altered(finished, tmp_path / "run", release="for release")
    assert summary.line(folder).startswith("DO NOT RELY ON THESE FIGURES. The ledger does not confirm this run")


def test_an_adapter_alone_carries_the_mark_that_lies_beside_it(finished, tiny_bert, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(finished / "adapter", adapter)
    given = [f"--model={tiny_bert}", f"--adapter={adapter}"]
    for note, mark in (
        (None, "NOT FOR RELEASE"), ("accuracy 0.7; NO PRIVACY; 1 KB", "NO PRIVACY"), ("epsilon 8", "unknown"), ("", "unknown"),
    ):  # fmt: skip
        if note is not None:
            (adapter / "README.md").write_text(note)
        assert export.main([*given, f"--out={tmp_path / mark}", "--overwrite"]) == 0
        assert f"**Release: {mark}" in (tmp_path / mark / "README.md").read_text()


def test_a_run_on_a_base_in_few_bits_is_merged_into_the_base_itself(finished, tmp_path, capsys):
    folder = altered(finished, tmp_path / "run", quantize="int8")
    assert export.main([f"--workdir={folder}", f"--out={tmp_path / 'small'}"]) == 0
    assert "froze its base in int8" in capsys.readouterr().out
    export.main([f"--workdir={finished}", f"--out={tmp_path / 'plain'}"])
    assert "froze" not in capsys.readouterr().out
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("small", "plain")]
    assert files[0] == files[1]


def test_the_runs_dtype_is_the_exports_unless_another_is_asked_for(finished, tmp_path):
    for own, name, more in (
        ("bfloat16", "bfloat16", ()),
        ("bfloat16", "float16", ("--dtype=float16",)),
        ("mixed", "float32", ()),
    ):
        folder = altered(finished, tmp_path / f"run {name}", dtype=own)
        assert export.main([f"--workdir={folder}", f"--out={tmp_path / name}", *more]) == 0
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == name


def test_a_workdir_without_an_adapter_or_with_a_damaged_config_is_refused(finished, tmp_path, capsys):
    folder = altered(finished, tmp_path / "run")
    assert "run's own directory" in refusal(capsys, f"--workdir={folder}", f"--out={as_export(folder)}", "--overwrite")
    shutil.rmtree(folder / "adapter")
    assert "has no adapter yet" in refusal(capsys, f"--workdir={folder}", f"--out={tmp_path / 'out'}")
    for text in ("{", "[]", '{"model": "x"}'):
        (folder / "config.json").write_text(text)
        assert "damaged" in refusal(capsys, f"--workdir={folder}", f"--out={tmp_path / 'out'}")


def as_export(folder):
    """`folder` with a README.md as exports have one."""
    (folder / "README.md").write_text("# base with a merged LoRA adapter")
    return folder


def test_the_bases_place_may_be_given_anew(finished, tiny_bert, tmp_path, capsys):
    folder = altered(finished, tmp_path / "run", model=str(tmp_path / "gone"))
    assert "gone" in refusal(capsys, f"--workdir={folder}", f"--out={tmp_path / 'out'}")
    assert export.main([f"--workdir={folder}", f"--model={tiny_bert}", f"--out={tmp_path / 'out'}"]) == 0
