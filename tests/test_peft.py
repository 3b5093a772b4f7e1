"""Adapter files: what we write is what we read, PEFT would read the same, and what we cannot do is refused."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dplora_jax import lora, models, peft
from dplora_jax.errors import InputError
from dplora_jax.models.bert import Bert, BertConfig
from tests.conftest import GOLDEN

pytestmark = pytest.mark.usefixtures("quick_compile")
CONFIGS = {
    "all layers": lora.LoraConfig(4, 8, ("q", "v")),
    "last layers": lora.LoraConfig(3, 5, ("q", "v"), last_layers=2),
    "head alone": lora.LoraConfig(4, 8, ()),
    "all-linear": lora.LoraConfig(2, 1.5, ("all-linear",)),
    "one of two that end alike": lora.LoraConfig(2, 4, ("down", "k"), last_layers=1),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
LAYER_MODULES = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
)  # fmt: skip
MODULES = [f"bert.encoder.layer.{i}.{name}" for i in range(3) for name in LAYER_MODULES]
MODULES += ["bert.embeddings.word_embeddings", "bert.pooler.dense", "classifier"]


@pytest.fixture(scope="module")
def classifier():
    return models.from_pretrained(GOLDEN / "bert_tiny_classifier")


def trained(model, params, config):
    rng = np.random.default_rng(0)
    adapter = lora.init(jax.random.key(0), model, params, config)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + rng.normal(0, 0.1, leaf.shape), jnp.float32), adapter)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)  # the scales are part of the structure
    jax.tree.map(np.testing.assert_array_equal, left, right)


@configs
def test_loading_what_was_saved_gives_it_back_exactly(classifier, tmp_path, config):
    model, params = classifier
    adapter = trained(model, params, config)
    peft.save(tmp_path, model, adapter, config)
    loaded, read = peft.load(tmp_path, model, params)
    assert_same(loaded, adapter)
    assert (read.rank, read.alpha) == (config.rank, config.alpha)
    assert read.last_layers == config.last_layers
    assert lora.resolve_targets(model, read.targets) == lora.resolve_targets(model, config.targets)
    assert_same(lora.init(jax.random.key(0), model, params, read), lora.init(jax.random.key(0), model, params, config))


def test_a_language_models_adapter_has_no_head(tmp_path):
    model, params = models.from_pretrained(GOLDEN / "bert_tiny_mlm")
    adapter = trained(model, params, CONFIGS["all layers"])
    peft.save(tmp_path, model, adapter, CONFIGS["all layers"])
    assert_same(peft.load(tmp_path, model, params)[0], adapter)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] is None


def test_saving_again_replaces_and_leaves_no_drafts(classifier, tmp_path):
    model, params = classifier
    for name in ("all-linear", "all layers"):
        adapter = trained(model, params, CONFIGS[name])
        peft.save(tmp_path, model, adapter, CONFIGS[name])
    assert_same(peft.load(tmp_path, model, params)[0], adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_adapter_written_by_peft_gives_its_logits(classifier):
    model, params = classifier
    adapter, config = peft.load(GOLDEN / "peft_bert_tiny" / "adapter", model, params)
    assert config == lora.LoraConfig(4, 8, ("query", "value"))
    with np.load(GOLDEN / "peft_bert_tiny" / "golden.npz") as file:
        batch = {name: value.astype(np.int32) for name, value in file.items() if name != "logits"}
        logits = file["logits"]
    adapted, plain = (jax.jit(Bert.apply, static_argnums=0)(model, params, batch, a) for a in (adapter, None))
    np.testing.assert_allclose(adapted, logits, atol=2e-4)
    assert np.abs(plain - logits).max() > 0.1


def test_we_write_the_tensors_that_peft_writes(classifier, tmp_path):
    model, params = classifier
    directory = GOLDEN / "peft_bert_tiny" / "adapter"
    adapter, config = peft.load(directory, model, params)
    peft.save(tmp_path, model, adapter, config)
    theirs, ours = (safetensors.numpy.load_file(d / "adapter_model.safetensors") for d in (directory, tmp_path))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
    theirs, ours = (json.loads((d / "adapter_config.json").read_text()) for d in (directory, tmp_path))
    assert ours.keys() <= theirs.keys()
    for option in ours.keys() - {"modules_to_save"}:  # PEFT lists a second name of heads, which this model lacks
        assert ours[option] == theirs[option]


def test_names_and_shapes_follow_peft(classifier):
    model, params = classifier
    config = lora.LoraConfig(4, 8, ("q", "up"), last_layers=1)
    state = peft.to_state_dict(model, trained(model, params, config), config)
    prefix = "base_model.model.bert.encoder.layer.2."
    assert {name: value.shape for name, value in state.items()} == {
        prefix + "attention.self.query.lora_A.weight": (4, 48),
        prefix + "attention.self.query.lora_B.weight": (48, 4),
        prefix + "intermediate.dense.lora_A.weight": (4, 48),
        prefix + "intermediate.dense.lora_B.weight": (96, 4),
        "base_model.model.classifier.weight": (3, 48),
        "base_model.model.classifier.bias": (3,),
    }


def selected_by_peft(document):
    """The modules that PEFT adapts for an adapter_config.json: its rule, as of version 0.21."""
    targets, layers = document["target_modules"], document["layers_to_transform"]
    if isinstance(targets, str):
        assert layers is None  # PEFT refuses both together
        return {name for name in MODULES if re.fullmatch(targets, name)}
    chosen = {name for name in MODULES if any(name == t or name.endswith("." + t) for t in targets)}
    if layers is None:
        return chosen
    return {name for name in chosen if (found := re.match(r".*\.[^.]*\.(\d+)\.", name)) and int(found[1]) in layers}


SUBSETS = [
    ("q",), ("q", "v"), ("q", "k", "v"), ("o",), ("down",), ("up",), ("o", "down"), ("up", "o"), ("k", "down"),
    ("all-linear",), ("pooler",), ("q", "pooler"), (),
]  # fmt: skip


@pytest.mark.parametrize("last_layers", [None, 1, 2])
@pytest.mark.parametrize("targets", SUBSETS, ids="+".join)
def test_target_modules_select_exactly_the_adapted_matrices(classifier, tmp_path, targets, last_layers):
    model, params = classifier
    config = lora.LoraConfig(2, 4, targets, last_layers)
    adapter = lora.init(jax.random.key(0), model, params, config)
    peft.save(tmp_path, model, adapter, config)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    names = peft.to_state_dict(model, adapter, config)
    adapted = {n.removeprefix(peft.PREFIX).removesuffix(".lora_A.weight") for n in names if "lora_A" in n}
    assert selected_by_peft(document) == adapted
    chosen = lora.resolve_targets(model, targets)
    assert len(adapted) == sum((last_layers or 3) if model.targets[name].layered else 1 for name in chosen)
    assert document["target_modules"] != []  # PEFT refuses an adapter that lists no module


def test_a_gradient_tree_with_frozen_has_names_too(classifier):
    model, params = classifier
    config = CONFIGS["last layers"]
    adapter = trained(model, params, config)
    _, gradient = lora.freeze_a(params, adapter)
    state = peft.to_state_dict(model, gradient, config)
    assert not any("lora_A" in name for name in state)
    whole = peft.to_state_dict(model, adapter, config)
    assert state.keys() == {name for name in whole if "lora_A" not in name}
    name = "base_model.model.bert.encoder.layer.1.attention.self.value.lora_B.weight"
    np.testing.assert_array_equal(state[name], adapter["layers"]["value"].b[0])


@pytest.fixture
def saved(classifier, tmp_path):
    """A good adapter on query and value of all layers, and how to change it: saved(options, tensors), None removes."""
    model, params = classifier
    peft.save(tmp_path, model, trained(model, params, CONFIGS["all layers"]), CONFIGS["all layers"])

    def change(options=(), tensors=()):
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(options)))
        path = tmp_path / "adapter_model.safetensors"
        changed = safetensors.numpy.load_file(path) | dict(tensors)
        safetensors.numpy.save_file({name: value for name, value in changed.items() if value is not None}, path)
        return tmp_path

    return change


def refusal(classifier, path):
    with pytest.raises(InputError) as caught:
        peft.load(path, *classifier)
    sentence = str(caught.value)
    assert sentence.startswith(str(path))
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def test_what_is_not_implemented_is_refused_by_name(classifier, saved):
    assert "use_dora" in refusal(classifier, saved({"use_dora": True}))


Q0 = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_{}.weight"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({Q0.format("A"): None}, "query are incomplete: bert.encoder.layer.0"),
        ({Q0.format("B"): None}, "query are incomplete: bert.encoder.layer.0"),
        ({Q0.format("A"): np.zeros((4, 47), np.float32)}, "query"),
        ({Q0.format("A").replace(".0.", f".{i}."): np.zeros((4, 47), np.float32) for i in range(3)}, "do not fit"),
        ({Q0.format(x).replace(".0.", f".{i}."): None for i in range(3) for x in "A"}, "incomplete"),
        ({"base_model.model.bert.pooler.dense.lora_A.weight": np.zeros((4, 48), np.float32)}, "bert.pooler.dense"),
        ({"base_model.model.classifier.weight": np.zeros((4, 48), np.float32)}, "labels"),
        ({"base_model.model.classifier.bias": np.zeros(4, np.float32)}, "labels"),
        ({"base_model.model.classifier.bias": None}, "classifier.bias"),
        ({"base_model.model.classifier.weight": None}, "classifier.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(classifier, saved, tensors, words):
    assert words in refusal(classifier, saved(tensors=tensors))


def test_a_rank_that_is_not_the_matrices_own_is_refused(classifier, saved):
    assert "rank 8" in refusal(classifier, saved({"r": 8}))  # alpha / r would be another scale


def test_an_adapter_without_head_keeps_the_models_own(classifier, saved):
    model, params = classifier
    names = ("base_model.model.classifier.weight", "base_model.model.classifier.bias")
    adapter, _ = peft.load(saved({"modules_to_save": None}, dict.fromkeys(names)), model, params)
    assert_same(adapter["head"], params["head"])


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", [None, b"", b"\xff\x00garbage\x80", b"[]"])
def test_missing_and_damaged_files_are_refused(classifier, saved, name, damage):
    path = saved() / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    refusal(classifier, path.parent)


def test_another_models_adapter_is_refused():
    config = BertConfig(99, 32, 3, 4, 64, 64, 2, num_labels=3)  # narrower
    narrow = Bert(config)
    params = {"head": {"kernel": jnp.zeros((32, 3)), "bias": jnp.zeros(3)}}
    refusal((narrow, params), GOLDEN / "peft_bert_tiny" / "adapter")
