"""An adapter exported alone, its card, and what goes to the hub: the files that were written, of a finished run for release."""

import shutil

import gguf
import numpy as np
import pytest
import safetensors.numpy
import yaml
from huggingface_hub import ModelCard

from dplora_jax.config import replace
from dplora_jax.federation import workdir_files
from dplora_jax.privacy.ledger import Ledger
from experiments import export
from experiments.ledger import Agreement
from experiments.run import card_header, model_card
from tests import hub_stand_in
from tests.conftest import GOLDEN
from tests.experiments.test_export import export_case, refusal
from tests.experiments.test_export_workdir import altered, charge, finished, without_privacy  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compile")
TOKEN = "hf_standinsecret"
HOSTILE = "a: b\n---\nlicense: mit # \"x\" 'y' {z} \x07\u2028\ud800 - [1] | > & * ! %"


def header(out):
    """The header of an export's card, as the hub's own reader and as any reader of YAML has it."""
    text = (out / "README.md").read_text()
    found = yaml.safe_load(text.removeprefix("---\n").split("\n---\n")[0])
    assert ModelCard(text).data.to_dict().keys() == found.keys()
    return found


@pytest.fixture(scope="module")
def released(finished, tmp_path_factory):  # noqa: F811
    """A workdir as a run for release leaves it: without a seed, evaluated on a public test set, its ledger ended."""
    folder = tmp_path_factory.mktemp("released") / "finance"
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("privacy_ledger.*"))
    stored = workdir_files.read_config(folder)
    config = replace(stored.config, seed=None)
    charge(folder, config, stored.description | {"release": "for release"}, stored.mechanisms)
    Ledger(folder / "privacy_ledger.jsonl").append(entry="end", round=1)
    lines = [line.values for line in workdir_files.read_metrics(folder)]
    workdir_files.write_metrics(folder, [line | {"accuracy": 0.75, "macro_f1": 0.7} for line in lines])
    (folder / "private").mkdir(mode=0o700)
    (folder / "private" / "diagnostics.jsonl").write_text("of the records themselves")
    (folder / "adapter" / "notes.txt").write_text("not an adapter's file")
    return folder


def push(folder, out, *more):
    return [f"--workdir={folder}", f"--out={out}", "--format=peft", "--push_to_hub=me/finance", *more]


def test_peft_files_are_the_adapters_own_and_their_header_states_the_guarantee(released, tmp_path, capsys):
    out = tmp_path / "out"
    assert export.main([f"--workdir={released}", f"--out={out}", "--format=peft"]) == 0
    assert "for release" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    ours, theirs = (
        safetensors.numpy.load_file(folder / "adapter_model.safetensors") for folder in (out, released / "adapter")
    )
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    said, last = header(out), workdir_files.read_metrics(released)[-1]
    guarantee = said.pop("differential_privacy")
    assert last.largest <= guarantee.pop("epsilon") < last.largest + 0.01
    assert guarantee == {
        "delta": 1e-3, "unit": "one record of one client", "trust": "local", "release": "for release",
        "neighbours": "one record is replaced by a null record, which contributes nothing",
    }  # fmt: skip
    (index,) = said.pop("model-index")
    metrics = {m["name"]: (m["type"], m["value"]) for m in index["results"][0]["metrics"]}
    assert metrics == {"accuracy": ("accuracy", 0.75), "macro-F1": ("f1", 0.7)}
    assert said == {
        "library_name": "peft", "pipeline_tag": "text-classification", "metrics": ["accuracy", "f1"],
        "tags": ["lora", "federated-learning", "differential-privacy"],
    }, "a license is the person's to state, and a path is no base's name"  # fmt: skip
    card = (out / "README.md").read_text()
    for words in (
        "**Epsilon:**",
        "at delta 0.001",
        "**Unit:** one record of one client",
        "**Neighbours:**",
        "PRIVACY.md",
    ):
        assert words in card
    assert 'outputs: ["good", "bad", "unclear"]' in card, "an export of this folder would not know the labels"
    capsys.readouterr()
    assert "give --overwrite" in refusal(capsys, f"--workdir={released}", f"--out={out}")


def test_an_adapter_alone_has_no_guarantee_in_its_header(tmp_path):
    given = [f"--model={GOLDEN / 'peft_llama_all/base'}", f"--adapter={GOLDEN / 'peft_llama_all/adapter'}"]
    for kind in ("merged", "peft", "gguf"):
        assert export.main([*given, f"--out={tmp_path / kind}", f"--format={kind}"]) == 0
        said = header(tmp_path / kind)
        assert said["tags"] == ["lora"]
        assert said["pipeline_tag"] == "text-generation"
        assert "differential_privacy" not in said
    assert header(tmp_path / "peft")["library_name"] == "peft"


def test_a_gguf_adapter_says_whether_it_may_be_released_and_replaces_an_earlier_export(tmp_path, capsys):
    _, adapter, out = export_case("llama", tmp_path)
    given = [f"--model={GOLDEN / 'peft_llama_all/base'}", f"--adapter={adapter}", f"--out={out}", "--format=gguf"]
    assert export.main([*given, "--overwrite"]) == 0
    assert {p.name for p in out.iterdir()} == {"README.md", "adapter.gguf"}
    fields = gguf.GGUFReader(out / "adapter.gguf").fields
    assert fields["general.description"].contents().startswith("Release: unknown")
    assert "llama-cli -m base.gguf --lora" in capsys.readouterr().out
    classifier = [f"--model={GOLDEN / 'bert_tiny_classifier'}", f"--adapter={GOLDEN / 'peft_bert_tiny/adapter'}"]
    said = refusal(capsys, *classifier, f"--out={tmp_path / 'other'}", "--format=gguf")
    assert "no place for a classification head" in said
    assert not (tmp_path / "other").exists()
    assert "format" in refusal(capsys, *given[:2], f"--out={tmp_path / 'other'}", "--format=onnx")


def test_a_hostile_name_does_not_break_the_header(released, tmp_path):
    stored = workdir_files.read_config(released)
    config = replace(stored.config, dataset=HOSTILE, privacy_unit=f"column:{HOSTILE}", unit_rows=2)
    last = workdir_files.read_metrics(released)[-1].values
    run = export.Run(stored._replace(config=config), last, Agreement(True, ""))
    job = export.Job("m", tmp_path, tmp_path / HOSTILE.replace("\ud800", ""), "float32", None, run, "", 1, None, None)
    text = card_header.text(job, "peft", "text-classification", "owner/base")
    found = ModelCard(f"{text}\n\nlicense: mit\n").data
    assert found.license is None
    assert found.base_model == "owner/base"
    assert "license: mit" in found.differential_privacy["unit"]
    assert found.eval_results[0].dataset_type == card_header.plain(HOSTILE)
    assert text.count("\n---") == 1
    assert "mit" in model_card._guarantee(run).encode().decode(), "a card is a file in UTF-8"


@pytest.mark.parametrize(
    ("changes", "unit", "whole"),
    [
        ({"privacy_unit": "column:patient_id", "unit_rows": 4}, "value in column 'patient_id'", "unit"),
        ({"unit_rows": 4}, "one record of one client, in up to 4 rows", "record"),
        ({"trust": "client"}, "one client with all its records", "client"),
    ],
)
def test_the_header_names_the_unit_and_its_neighbours(released, changes, unit, whole):
    stored = workdir_files.read_config(released)
    run = export.Run(stored._replace(config=replace(stored.config, **changes)), {}, Agreement(True, ""))
    assert unit in card_header.privacy(run)["unit"]
    assert card_header.privacy(run)["neighbours"].startswith(f"one {whole} is replaced by a null {whole}")


def test_scores_on_clients_own_models_are_not_this_ones(released, tmp_path):
    stored, last = workdir_files.read_config(released), workdir_files.read_metrics(released)[-1].values
    run = export.Run(stored._replace(config=replace(stored.config, aggregation="fedsa")), last, Agreement(True, ""))
    job = export.Job("m", tmp_path, tmp_path, "float32", None, run, "", 1, None, None)
    assert card_header._metrics(job, "text-classification") == {}


def test_only_the_files_of_the_export_reach_the_hub(released, tmp_path):
    out, arguments = tmp_path / "out", push(released, tmp_path / "out")
    code = f"import sys\nfrom experiments import export\nsys.exit(export.main({arguments!r}))"
    settings = {"HF_HOME": tmp_path / "home", "HF_HUB_DISABLE_XET": 1}
    with hub_stand_in.taking_uploads(TOKEN) as (hub, endpoint):
        refused = hub_stand_in.run_python(code, HF_ENDPOINT=endpoint, HF_TOKEN="hf_another", **settings)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert "status 401" in refused.stderr
        assert not hub.repositories
        code = code.replace("'--push", "'--overwrite', '--push")
        (out / "mine.txt").write_text("stays here")
        done = hub_stand_in.run_python(code, HF_ENDPOINT=endpoint, HF_TOKEN=TOKEN, **settings)
        assert done.returncode == 0, done.stderr
        assert f"{endpoint}/me/finance" in done.stdout
    written = ("README.md", "adapter_config.json", "adapter_model.safetensors")
    assert hub.repositories == {"me/finance": {name: (out / name).read_bytes() for name in written}}
    assert hub.visibility == {"me/finance": "private"}
    assert len(hub.commits) == 1
    assert not any("hf_" in text for text in (done.stdout, done.stderr, refused.stderr))


def test_what_is_not_for_release_does_not_reach_the_hub(released, finished, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    bare, doubtful = without_privacy(finished, tmp_path / "bare"), altered(released, tmp_path / "doubtful", delta=1e-9)
    early = tmp_path / "early"
    shutil.copytree(released, early)
    for name in ("privacy_ledger.jsonl", "privacy_ledger.head"):
        (early / name).unlink()
    stored = workdir_files.read_config(early)
    charge(early, stored.config, stored.description | {"release": stored.release}, stored.mechanisms)
    for folder, words in {
        finished: "NOT FOR RELEASE: a seed makes the noise reproducible",
        bare: "has no privacy, and its adapter may reveal any record",
        doubtful: "The ledger does not confirm this run",
        early: "the run has not ended",
    }.items():
        assert words in refusal(capsys, *push(folder, out))
    alone = [
        f"--model={GOLDEN / 'peft_gpt2_all/base'}",
        f"--adapter={GOLDEN / 'peft_gpt2_all/adapter'}",
        f"--out={out}",
    ]
    assert "needs --workdir" in refusal(capsys, *alone, "--push_to_hub=me/x")
    assert "is not a name of a repository" in refusal(capsys, *push(released, out)[:-1], "--push_to_hub=a/b/c")
    assert not out.exists()
