"""What lies in an exported folder beside its weights: sentence-transformers' modules, tokenizer, licence and code."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy

from dplora_jax import models
from dplora_jax.models import hf_checkpoint
from tests.conftest import GOLDEN, write_tokenizer
from tests.models.test_hf_checkpoint import config_of, tensors_of

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("normalize", [False, True])
def test_sentence_transformers_modules_end_in_the_head(normalize, tmp_path):
    model, params = mean_pooled(normalize)
    hf_checkpoint.save_modules(tmp_path, model, params, ("a", "b", "c"))
    modules = json.loads((tmp_path / "modules.json").read_text())
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else []), "Dense"]
    assert [module["type"] for module in modules] == [f"sentence_transformers.models.{kind}" for kind in kinds]
    assert json.loads((tmp_path / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"] is True
    dense = tmp_path / modules[-1]["path"]
    linear = {"in_features": 48, "out_features": 3, "bias": True}
    identity = {"activation_function": "torch.nn.modules.linear.Identity"}
    assert json.loads((dense / "config.json").read_text()) == linear | identity
    head = safetensors.numpy.load_file(dense / "model.safetensors")
    np.testing.assert_array_equal(head["linear.weight"], np.asarray(params["head"]["kernel"]).T)
    np.testing.assert_array_equal(head["linear.bias"], params["head"]["bias"])
    assert json.loads((tmp_path / "config_sentence_transformers.json").read_text())["labels"] == ["a", "b", "c"]


def mean_pooled(normalize=False):
    model, params = models.from_pretrained(GOLDEN / "bert_tiny_classifier")
    return dataclasses.replace(
        model, config=dataclasses.replace(model.config, pooling="mean", normalize=normalize)
    ), params


def test_texts_are_cut_where_asked_else_where_the_source_says_else_at_the_last_position(tmp_path):
    model, params = mean_pooled()
    source = tmp_path / "source"
    source.mkdir()

    def cut(**options):
        hf_checkpoint.save_modules(tmp_path, model, params, "abc", source, **options)
        return json.loads((tmp_path / "sentence_bert_config.json").read_text())

    assert cut() == {"max_seq_length": 64, "do_lower_case": False}
    (source / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')
    assert cut() == {"max_seq_length": 20, "do_lower_case": True}
    assert cut(max_length=10)["max_seq_length"] == 10
    assert cut(max_length=1000)["max_seq_length"] == 64


def test_below_the_mean_lies_the_class_without_a_head_and_with_its_pooler(tmp_path):
    model, params = mean_pooled()
    source = GOLDEN / "bert_tiny_classifier"
    document = hf_checkpoint.config(model, config_of("bert_tiny_classifier"), ("a", "b", "c"))
    hf_checkpoint.save(tmp_path, model, params, document, source)
    assert document["architectures"] == ["BertModel"]
    whole = {name for name in tensors_of(source) if not name.startswith("classifier.")}
    assert set(tensors_of(tmp_path)) == {name.removeprefix("bert.") for name in whole}


def test_the_tokenizer_and_the_licence_go_along_but_neither_weights_nor_code(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    write_tokenizer(source)
    for name in (
        "vocab.txt",
        "tokenizer.model",
        "LICENSE",
        "generation_config.json",
        "model.safetensors",
        "notes.model",
    ):
        (source / name).write_text(name)
    hf_checkpoint.copy_side_files(source, out)
    kept = {
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "tokenizer.model",
        "LICENSE",
        "generation_config.json",
    }
    assert {path.name for path in out.iterdir()} == kept
    assert (out / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()


def test_of_a_models_own_code_what_config_names_goes_along_and_what_that_imports(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    named = {
        "AutoModel": "modeling_own.Own",
        "AutoTokenizer": ["tokenization_own.Own", None],
        "AutoConfig": "../secret.Own",
    }
    (source / "config.json").write_text(json.dumps({"auto_map": named}))
    (source / "modeling_own.py").write_text("import os\nfrom .blocks import Block\n    from .modeling_own import Own\n")
    for name in ("blocks.py", "tokenization_own.py", "train_on_our_data.py", "os.py"):
        (source / name).touch()
    (tmp_path / "secret.py").touch()
    hf_checkpoint.copy_side_files(source, out, with_code=True)
    assert {path.name for path in out.iterdir()} == {"modeling_own.py", "blocks.py", "tokenization_own.py"}


def test_a_pad_token_that_stands_in_is_written_down(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    write_tokenizer(source)
    said = json.loads((source / "tokenizer_config.json").read_text())
    said["pad_token"] = {"__type": "AddedToken", "content": "[PAD]", "special": True}
    (source / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = models.load_tokenizer(source)
    hf_checkpoint.copy_side_files(source, out, tokenizer)
    assert json.loads((out / "tokenizer_config.json").read_text()) == said
    (source / "tokenizer_config.json").write_text(json.dumps(said | {"pad_token": None}))
    tokenizer.pad_token = "[UNK]"
    hf_checkpoint.copy_side_files(source, out, tokenizer)
    assert json.loads((out / "tokenizer_config.json").read_text())["pad_token"] == "[UNK]"
