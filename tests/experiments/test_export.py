"""The merged checkpoint as a person makes it: the logits PyTorch has of it, what it says of itself, and what is refused."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from dplora_jax import lora, models, peft
from experiments import export
from experiments.run import model_card
from tests import exported
from tests.conftest import GOLDEN

pytestmark = pytest.mark.usefixtures("quick_compile")


def export_case(name, tmp_path, *more):
    """Export a case of `exported` -> (its base, its adapter, the export)."""
    base = exported.base_of(name, tmp_path / "base")
    adapter, out = exported.adapter_of(name, base, tmp_path / "adapter"), tmp_path / "out"
    assert export.main([f"--model={base}", f"--adapter={adapter}", f"--out={out}", *more]) == 0
    return base, adapter, out


def refusal(capsys, *arguments):
    """The one sentence with which the command line is refused."""
    capsys.readouterr()
    assert export.main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]*\.\n", said)
    return said


def read_back(out):
    """The model and parameters of an export; of a sentence-transformers one, with the head from its own folder."""
    dense = out / "2_Dense" if (out / "2_Dense").exists() else out / "3_Dense"
    if not dense.exists():
        return models.from_pretrained(out)
    modules = json.loads((out / "modules.json").read_text())
    assert modules.pop()["path"] == dense.name
    (out / "modules.json").write_text(json.dumps(modules))
    head = safetensors.numpy.load_file(dense / "model.safetensors")
    model, params = models.from_pretrained(out, num_labels=len(head["linear.bias"]))
    return model, params | {"head": {"kernel": head["linear.weight"].T, "bias": head["linear.bias"]}}


def logits_of(model, params, batch, adapter=None):
    batch = {name: np.asarray(value).astype(np.int32) for name, value in batch.items()}
    return np.asarray(jax.jit(model.apply)(params, batch, adapter))


def by_hand(base, adapter):
    """The tensors that W + (alpha / r) B A makes of a base's file and an adapter's file, in float64."""
    tensors = safetensors.numpy.load_file(base / "model.safetensors")
    pairs = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
    said = json.loads((adapter / "adapter_config.json").read_text())
    for name, value in pairs.items():
        module, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        if part == "A.weight":
            b = pairs[name.replace("lora_A", "lora_B")].astype(np.float64)
            delta = said["lora_alpha"] / said["r"] * (b @ value)
            tensors[f"{module}.weight"] = tensors[f"{module}.weight"] + (delta.T if said["fan_in_fan_out"] else delta)
        elif not module:
            tensors[name.removeprefix("base_model.model.")] = value
    return tensors


def tensors_of(out):
    """What an export's files hold, under the names of the base's: those of sentence-transformers are other ones."""
    found = safetensors.numpy.load_file(out / "model.safetensors")
    for dense in out.glob("*_Dense"):
        head = safetensors.numpy.load_file(dense / "model.safetensors")
        found = {f"bert.{name}": value for name, value in found.items()}
        found |= {name.replace("linear", "classifier"): value for name, value in head.items()}
    return found


@pytest.mark.parametrize("name", exported.CASES)
def test_the_export_is_the_base_plus_the_scaled_product_and_the_one_whose_logits_pytorch_gave(name, tmp_path):
    base, adapter, out = export_case(name, tmp_path)
    expected = by_hand(base, adapter)
    for tensor, value in tensors_of(out).items():
        np.testing.assert_allclose(value, expected[tensor], rtol=1e-5, atol=1e-6, err_msg=tensor)
    with np.load(GOLDEN / "export" / f"{name}.npz") as file:
        stored = dict(file)
    assert exported.listing(out, base) == stored.pop("tensors").tolist()
    logits, batch = stored.pop("logits"), stored
    model, params = read_back(out)
    if "texts" in batch:
        texts = batch["texts"].tolist()
        batch = models.load_tokenizer(out)(texts, padding=True, truncation=True, max_length=9, return_tensors="np")
    kept = batch["attention_mask"] == 1 if logits.ndim == 3 and "attention_mask" in batch else slice(None)
    np.testing.assert_allclose(logits_of(model, params, batch)[kept], logits[kept], atol=2e-5)


def test_a_mean_pooled_classifier_says_that_transformers_own_class_differs(tmp_path, capsys):
    _, _, out = export_case("bert_mean_normalized", tmp_path, "--labels=down,flat,up")
    said = capsys.readouterr().out
    assert "transformers' own classifier reads the first token" in said
    assert f"SentenceTransformer({str(out)!r})" in said
    assert "SentenceTransformer" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["architectures"] == ["BertModel"]
    assert json.loads((out / "config_sentence_transformers.json").read_text())["labels"] == ["down", "flat", "up"]
    export_case("bert_pooler", tmp_path / "pooler")
    assert "SentenceTransformer" not in capsys.readouterr().out


def test_a_family_that_transformers_lacks_is_left_to_its_own_code(tmp_path, capsys):
    model, params = models.from_pretrained(GOLDEN / "chatglm2_tiny")
    peft.save(tmp_path / "adapter", model, exported.draw(0, model, params, exported.ALL), exported.ALL)
    given = [f"--model={GOLDEN / 'chatglm2_tiny'}", f"--adapter={tmp_path / 'adapter'}", f"--out={tmp_path / 'out'}"]
    assert export.main(given) == 0
    assert "own published code" in capsys.readouterr().out
    found, expected = tensors_of(tmp_path / "out"), by_hand(GOLDEN / "chatglm2_tiny", tmp_path / "adapter")
    assert set(found) == set(expected)


def test_labels_are_those_given_else_the_bases_else_numbers(tmp_path, capsys):
    _, adapter, out = export_case("llama_classifier", tmp_path, "--labels=down, flat ,up")
    assert json.loads((out / "config.json").read_text())["label2id"] == {"down": 0, "flat": 1, "up": 2}
    assert "down, flat, up" in (out / "README.md").read_text()
    arguments = [f"--model={out}", f"--adapter={adapter}", f"--out={tmp_path / 'second'}"]
    export.main(arguments)
    assert list(json.loads((tmp_path / "second" / "config.json").read_text())["label2id"]) == ["down", "flat", "up"]
    export_case("gpt2_classifier", tmp_path / "third")
    third = json.loads((tmp_path / "third" / "out" / "config.json").read_text())
    assert third["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    arguments[-1] = f"--out={tmp_path / 'fourth'}"
    assert "3 labels, and 2 are named" in refusal(capsys, *arguments, "--labels=down,up")
    language_model = [f"--model={GOLDEN / 'peft_gpt2_all/base'}", f"--adapter={GOLDEN / 'peft_gpt2_all/adapter'}"]
    assert "is a language model" in refusal(capsys, *language_model, arguments[-1], "--labels=down,up")
    assert "not all different" in refusal(capsys, *arguments, "--labels=up,up,down")


def test_the_base_as_a_classifier_takes_as_many_labels_as_the_adapters_head(tmp_path):
    model, params = models.from_pretrained(GOLDEN / "llama_tiny", num_labels=2)
    config = lora.LoraConfig(2, 4)
    tree = exported.draw(0, model, params, config)
    peft.save(tmp_path / "adapter", model, tree, config)
    base = tmp_path / "base"
    shutil.copytree(GOLDEN / "llama_tiny", base)
    said = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(said | {"pad_token_id": 0}))
    assert export.main([f"--model={base}", f"--adapter={tmp_path / 'adapter'}", f"--out={tmp_path / 'out'}"]) == 0
    read, merged = models.from_pretrained(tmp_path / "out")
    batch = exported.inputs_of("llama") | {"attention_mask": np.ones((3, 13), np.int32)}
    np.testing.assert_allclose(logits_of(read, merged, batch), logits_of(model, params, batch, tree), atol=2e-5)
    assert read.config.num_labels == 2


def test_the_adapters_head_and_labels_count_whatever_head_the_base_has(tmp_path, recwarn):
    base, adapter, out = GOLDEN / "bert_tiny_classifier", tmp_path / "adapter", tmp_path / "out"  # of three labels
    model, params = models.from_pretrained(base, label_names=("good", "bad"))
    tree = exported.draw(0, model, params, lora.LoraConfig(2, 4))
    peft.save(adapter, model, tree, lora.LoraConfig(2, 4))
    (adapter / "README.md").write_text(model_card.adapter_note(model, "the end", ("good", "bad")))
    recwarn.clear()
    assert export.main([f"--model={base}", f"--adapter={adapter}", f"--out={out}"]) == 0
    assert not recwarn.list
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "good", "1": "bad"}
    _, merged = models.from_pretrained(out)
    np.testing.assert_array_equal(merged["head"]["kernel"], tree["head"]["kernel"])


def test_bad_input_is_refused_before_anything_is_written(tmp_path, capsys):
    base, adapter, out = GOLDEN / "peft_gpt2_all/base", GOLDEN / "peft_gpt2_all/adapter", tmp_path / "out"
    model, adapter, to = f"--model={base}", f"--adapter={adapter}", f"--out={out}"
    assert "give --workdir" in refusal(capsys, to)
    assert "give --workdir" in refusal(capsys, model, adapter, f"--workdir={tmp_path}", to)
    assert "give --workdir" in refusal(capsys, adapter, to)
    assert "--out is missing" in refusal(capsys, model, adapter)
    assert "--dtype=int8" in refusal(capsys, model, adapter, to, "--dtype=int8")
    assert "unexpected argument" in refusal(capsys, model, adapter, to, "there")
    assert "nosuchflag" in refusal(capsys, "--nosuchflag=1")
    assert "holds no readable PEFT adapter" in refusal(capsys, model, f"--adapter={tmp_path}", to)
    assert "no place in this model" in refusal(capsys, f"--model={GOLDEN / 'llama_tiny'}", adapter, to)
    assert "not a run's workdir" in refusal(capsys, f"--workdir={tmp_path}", to)
    assert not out.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_holds_something_is_refused_and_kept(tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(GOLDEN / "peft_gpt2_all/base", base)
    given = [f"--model={base}", f"--adapter={GOLDEN / 'peft_gpt2_all/adapter'}"]
    out.mkdir()
    (out / "model.safetensors").write_text("mine")
    for more in ((), ("--overwrite",)):
        assert "no export wrote" in refusal(capsys, *given, f"--out={out}", *more)
    (tmp_path / "file").touch()
    assert "no export wrote" in refusal(capsys, *given, f"--out={tmp_path / 'file'}")
    assert "no export wrote" in refusal(capsys, *given, f"--out={base}", "--overwrite")
    (base / "README.md").write_text("# base with a merged LoRA adapter")
    assert "base model's own" in refusal(capsys, *given, f"--out={base}", "--overwrite")
    assert (out / "model.safetensors").read_text() == "mine"
    assert "cannot be written" in refusal(capsys, *given, f"--out={tmp_path / 'file' / 'out'}")


def test_overwriting_leaves_nothing_of_the_earlier_export_that_would_be_read(tmp_path, capsys):
    _, _, out = export_case("bert_mean", tmp_path)
    (out / "notes.txt").write_text("mine")
    given = [f"--model={GOLDEN / 'variants/llama_mqa'}", f"--out={out}", f"--adapter={tmp_path / 'other'}"]
    model, params = models.from_pretrained(GOLDEN / "variants/llama_mqa")
    peft.save(tmp_path / "other", model, exported.draw(0, model, params, exported.ALL), exported.ALL)
    assert "give --overwrite" in refusal(capsys, *given)
    assert export.main([*given, "--overwrite", "--max_shard_bytes=9000"]) == 0
    assert not {"modules.json", "model.safetensors", "tokenizer.json"} & {path.name for path in out.iterdir()}
    assert export.main([*given, "--overwrite"]) == 0
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "README.md", "notes.txt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "other", "out"], "drafts were left"
