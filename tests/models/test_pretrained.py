"""What is read from a checkpoint, and the one sentence for each way in which it may be broken."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dplora_jax import models
from dplora_jax.errors import InputError
from dplora_jax.models import pretrained
from tests.conftest import GOLDEN
from tests.models.checkpoints import CLASSIFIER, TENSORS, assert_same, write

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def reference():
    return models.from_pretrained(CLASSIFIER)


def refusal(directory, **options):
    """The one sentence with which `directory` is refused."""
    with pytest.raises(InputError) as caught:
        models.from_pretrained(directory, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def test_a_directory_is_read_as_path_or_text(reference, tmp_path):
    assert_same(models.from_pretrained(str(write(tmp_path))), reference)


def test_every_tensor_lands_in_its_place(reference):
    _, params = reference
    layers, prefix = params["layers"], "bert.encoder.layer.1."
    np.testing.assert_array_equal(layers["up"]["kernel"][1], TENSORS[prefix + "intermediate.dense.weight"].T)
    np.testing.assert_array_equal(layers["query"]["bias"][1], TENSORS[prefix + "attention.self.query.bias"])
    np.testing.assert_array_equal(params["embed"]["word"], TENSORS["bert.embeddings.word_embeddings.weight"])
    np.testing.assert_array_equal(params["head"]["kernel"], TENSORS["classifier.weight"].T)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(tensor.size for tensor in TENSORS.values())


def shard(directory):
    """The same checkpoint in two files and an index."""
    write(directory)
    (directory / "model.safetensors").unlink()
    names = sorted(TENSORS)
    parts = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, part in parts.items():
        safetensors.numpy.save_file({name: TENSORS[name] for name in part}, directory / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_shards_give_the_same_parameters(reference, tmp_path):
    assert_same(models.from_pretrained(shard(tmp_path)), reference)


def test_a_missing_shard_is_named(tmp_path):
    (shard(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors does not exist" in refusal(tmp_path)


def test_a_bfloat16_checkpoint_is_read(reference, tmp_path):
    write(tmp_path, {name: np.asarray(jnp.asarray(value, jnp.bfloat16)) for name, value in TENSORS.items()})
    _, params = models.from_pretrained(tmp_path)
    expected = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), reference[1])
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_missing_tensor_is_named(tmp_path):
    name = "bert.encoder.layer.1.output.dense.weight"
    assert name in refusal(write(tmp_path, {k: v for k, v in TENSORS.items() if k != name}))


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path):
    name = "bert.encoder.layer.1.output.dense.bias"
    sentence = refusal(write(tmp_path, TENSORS | {name: np.zeros(47, np.float32)}))
    assert all(part in sentence for part in (name, "(47,)", "(48,)"))


def test_a_tensor_without_a_place_is_named(tmp_path):
    strange = {"bert.encoder.layer.3.output.dense.weight": np.zeros(2, np.float32), "gate": np.zeros(2, np.float32)}
    assert "tensor bert.encoder.layer.3.output.dense.weight has no place" in refusal(write(tmp_path, TENSORS | strange))


def test_heads_of_other_tasks_and_saved_constants_may_lie_beside(reference, tmp_path):
    names = (
        "cls.predictions.bias",
        "lm_head.weight",
        "qa_outputs.bias",
        "bert.embeddings.position_ids",
        "h.0.attn.bias",
    )
    beside = {name: np.zeros(2, np.float32) for name in names}
    assert_same(models.from_pretrained(write(tmp_path, TENSORS | beside)), reference)


def test_integers_are_no_weights(tmp_path):
    name = "bert.encoder.layer.1.output.dense.weight"
    sentence = refusal(write(tmp_path, TENSORS | {name: TENSORS[name].astype(np.int8)}))
    assert f"tensor {name} is I8, not one of F64, F32, F16, BF16" in sentence


def test_a_quantised_checkpoint_is_refused_by_its_method(tmp_path):
    assert "quantization_config (gptq)" in refusal(write(tmp_path, quantization_config={"quant_method": "gptq"}))


@pytest.mark.parametrize("damage", ["truncated", "random", "empty"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = write(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    random = np.random.default_rng(0).bytes(5000)
    path.write_bytes({"truncated": whole[: len(whole) // 2], "random": random, "empty": b""}[damage])
    assert f"{path} cannot be read" in refusal(tmp_path)


def test_a_directory_without_config_is_refused(tmp_path):
    (write(tmp_path) / "config.json").unlink()
    assert "config.json does not exist" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "\x80"])
def test_a_malformed_config_is_refused(tmp_path, text):
    (write(tmp_path) / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model_type", "t5"),
        ("model_type", None),
        ("position_embedding_type", "relative_key"),
        ("hidden_act", "foo"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("vocab_size", None),
        ("hidden_size", "48"),
        ("num_attention_heads", 5),
        ("num_hidden_layers", 0),
    ],
)
def test_an_unsupported_option_is_named(tmp_path, option, value):
    sentence = refusal(write(tmp_path, **{option: value}))
    assert f"{option}={value!r}" in sentence


def test_a_pytorch_file_alone_is_refused_with_the_way_out(tmp_path):
    (write(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    sentence = refusal(tmp_path)
    assert "no model.safetensors" in sentence
    assert "pytorch_model.bin" in sentence


def test_a_head_that_lacks_is_zero(tmp_path):
    body = {name: value for name, value in TENSORS.items() if not name.startswith("classifier")}
    model, params = models.from_pretrained(write(tmp_path, body, architectures=["BertModel"]), num_labels=5)
    assert model.config.num_labels == 5
    assert params["head"]["kernel"].shape == (48, 5)
    assert not any(leaf.any() for leaf in jax.tree.leaves(params["head"]))


def test_a_head_with_another_number_of_labels_is_refused():
    assert "num_labels differs" in refusal(CLASSIFIER, num_labels=4)


def test_what_the_checkpoint_is_decides_without_num_labels(tmp_path):
    assert models.from_pretrained(CLASSIFIER)[0].config.num_labels == 3
    assert models.from_pretrained(GOLDEN / "bert_tiny_mlm")[0].config.num_labels is None
    body = {name: value for name, value in TENSORS.items() if not name.startswith("classifier")}
    assert models.from_pretrained(write(tmp_path, body, id2label=None))[0].config.num_labels == 2


def test_a_checkpoint_without_the_model_prefix_is_read(reference, tmp_path):
    assert_same(
        models.from_pretrained(write(tmp_path, {k.removeprefix("bert."): v for k, v in TENSORS.items()})), reference
    )


def test_the_old_names_of_layer_norms_are_read(reference, tmp_path):
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in TENSORS.items()
    }
    assert old.keys() != TENSORS.keys()
    assert_same(models.from_pretrained(write(tmp_path, old)), reference)


def sentence_modules(directory, kinds=("Transformer", "Pooling", "Normalize"), mode="mean_tokens"):
    modules = [
        {"type": f"sentence_transformers.models.{k}", "path": "" if not i else f"{i}_{k}"} for i, k in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 48, "pooling_mode_cls_token": False, f"pooling_mode_{mode}": True}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize("kinds", [("Transformer", "Pooling", "Normalize"), ("Transformer", "Pooling")])
def test_a_sentence_models_own_pooling_is_taken(tmp_path, kinds):
    sentence_modules(write(tmp_path, architectures=["BertModel"]), kinds)
    model, params = models.from_pretrained(tmp_path, num_labels=3)
    assert model.config.pooling == "mean"
    assert model.config.normalize == ("Normalize" in kinds)
    assert "pooler" not in params


def test_a_checkpoint_without_pooler_is_mean_pooled(reference, tmp_path):
    assert reference[0].config.pooling == "pooler"
    model, _ = models.from_pretrained(write(tmp_path, {k: v for k, v in TENSORS.items() if "pooler" not in k}))
    assert model.config.pooling == "mean"
    assert not model.config.normalize


def test_another_pooling_or_module_is_refused(tmp_path):
    sentence_modules(write(tmp_path / "max"), mode="max_tokens")
    assert "only mean pooling is supported, not max." in refusal(tmp_path / "max")
    sentence_modules(write(tmp_path / "dense"), kinds=("Transformer", "Pooling", "Dense"))
    assert "a Dense module" in refusal(tmp_path / "dense")


def test_a_classifier_of_transformers_reads_its_pooler_though_a_sentence_models_files_lie_beside_it(
    reference, tmp_path
):
    sentence_modules(write(tmp_path))  # fine-tuned in a sentence model's folder
    assert_same(models.from_pretrained(tmp_path), reference)


@pytest.mark.parametrize(
    ("name", "gate"),
    [("llama_tiny", True), ("families/phi3", True), ("gpt2_tiny", False), ("bert_tiny_mlm", False)],
)
def test_which_matrices_there_are_is_known_without_weights(name, gate, monkeypatch):
    targets = models.from_pretrained(GOLDEN / name)[0].targets
    monkeypatch.setattr(pretrained, "read_params", None)
    found = pretrained.matrices(GOLDEN / name)
    assert found == set(itertools.chain(*(target.aliases for target in targets.values())))
    assert ("gate" in found) == gate
