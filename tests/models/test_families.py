"""The families that people fine-tune today against transformers' and PEFT's own logits; rows, padding, decoding, files."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dplora_jax import generation, lora, models, peft
from dplora_jax.models import hf_checkpoint, layers
from dplora_jax.models.decoder import Decoder
from tests.conftest import GOLDEN

pytestmark = pytest.mark.usefixtures("quick_compile")
FOLDER = GOLDEN / "families"
NAMES = sorted(path.name for path in FOLDER.iterdir())
ADAPTED = [name for name in NAMES if (FOLDER / name / "adapter").exists()]
ENCODERS = ("roberta", "xlm_roberta", "distilbert", "modernbert")
DECODERS = [name for name in NAMES if not name.startswith(ENCODERS) and "classifier" not in name]
# One of a kind stands for what its family's other variants do alike.
KINDS = [
    *("roberta_mlm", "distilbert_classifier", "modernbert_classifier", "qwen3_window", "gemma2", "gemma3", "gpt_neox"),
    *("phi3_long", "olmo3"),
]


@functools.cache
def load(name):
    """(model, params, batch, reference values) of a folder."""
    model, params = models.from_pretrained(FOLDER / name)
    with np.load(FOLDER / name / "golden.npz") as file:
        golden = dict(file)
    return model, params, {key: golden[key] for key in ("input_ids", "attention_mask")}, golden


@functools.cache
def applied():
    return jax.jit(lambda model, params, batch, adapter=None: model.apply(params, batch, adapter), static_argnums=0)


def logits_of(name, batch=None, adapter=None):
    model, params, own, _ = load(name)
    return np.asarray(applied()(model, params, own if batch is None else batch, adapter))


def attended(batch, logits):
    return logits if logits.ndim == 2 else logits[batch["attention_mask"] == 1]


@pytest.mark.parametrize("name", NAMES)
def test_logits_agree_with_transformers_on_attended_positions(name):
    _, _, batch, golden = load(name)
    np.testing.assert_allclose(attended(batch, logits_of(name)), attended(batch, golden["logits"]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_of_all_linear_written_by_peft_gives_its_logits(name):
    model, params, batch, golden = load(name)
    adapter, config = peft.load(FOLDER / name / "adapter", model, params)
    if "distilbert" not in name:  # of which PEFT refuses it
        assert lora.resolve_targets(model, ("all-linear",)) == lora.resolve_targets(model, config.targets)
    assert np.abs(golden["adapted_logits"] - golden["logits"]).max() > 0.05
    ours = logits_of(name, adapter=adapter)
    np.testing.assert_allclose(attended(batch, ours), attended(batch, golden["adapted_logits"]), atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapters_files_are_written_as_peft_writes_them(name, tmp_path):
    model, params, _, _ = load(name)
    adapter, config = peft.load(FOLDER / name / "adapter", model, params)
    peft.save(tmp_path, model, adapter, config)
    ours, theirs = (
        safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path, FOLDER / name / "adapter")
    )
    assert ours.keys() == theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    again, config_again = peft.load(tmp_path, model, params)
    assert config_again == config
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


@pytest.mark.parametrize("name", ADAPTED)
def test_a_merged_adapter_gives_the_same_logits(name):
    from dplora_jax.models import encoder

    model, params, batch, golden = load(name)
    adapter, config = peft.load(FOLDER / name / "adapter", model, params)
    merged = lora.merge(model, params, adapter, config)
    ours = np.asarray(applied()(encoder.reading(model, adapter), merged, batch))
    np.testing.assert_allclose(attended(batch, ours), attended(batch, golden["adapted_logits"]), atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_rows_do_not_mix_and_padding_is_not_seen(name):
    _, _, batch, _ = load(name)
    before = attended(batch, logits_of(name))
    hidden = batch["attention_mask"] == 0
    pad = batch["input_ids"][hidden][0]
    # RoBERTa counts positions by the ids of padding, and transformers with it.
    other = np.where(hidden, pad if "roberta" in name else 7, batch["input_ids"])
    np.testing.assert_array_equal(before, attended(batch, logits_of(name, batch | {"input_ids": other})))
    changed = batch | {"input_ids": batch["input_ids"].copy()}
    changed["input_ids"][1, :4] = 11, 12, 13, 14
    after = logits_of(name, changed)
    np.testing.assert_array_equal(after[[0, 2]], logits_of(name)[[0, 2]])
    assert np.abs(after[1] - logits_of(name)[1]).max() > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_scanned_layers_equal_unrolled_ones_and_their_number_adds_no_code(name, monkeypatch):
    model, params, batch, _ = load(name)
    config = lora.LoraConfig(2, 4, ("all-linear",))
    adapter = lora.init(jax.random.key(0), model, params, config)
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    monkeypatch.setattr(layers, "SHALLOW", 0)
    traced = jax.jit(lambda adapter: model.apply(params, batch, adapter)).trace(adapter)
    assert str(traced.jaxpr).count("scan[") == 1
    scanned = np.asarray(traced.lower().compile()(adapter))
    np.testing.assert_allclose(scanned, logits_of(name, adapter=adapter), atol=2e-4)


@pytest.mark.parametrize("name", [name for name in KINDS if name in DECODERS])
def test_decoding_with_a_cache_says_what_whole_rows_say(name):
    model, params, batch, _ = load(name)
    new = 6
    ids = np.asarray(
        jax.jit(lambda params, batch: generation.generate(model, params, batch, max_new_tokens=new))(params, batch)
    )
    width = batch["input_ids"].shape[1]
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        whole = np.zeros((1, width + new), np.int32)
        whole[0, : length + new] = [*batch["input_ids"][row, :length], *ids[row]]
        said = logits_of(name, {"input_ids": whole})[0, length - 1 : length + new - 1]
        np.testing.assert_array_equal(ids[row], said.argmax(-1))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_was_read(name, tmp_path):
    model, params, _, _ = load(name)
    hf = json.loads((FOLDER / name / "config.json").read_text())
    labels = tuple(hf["id2label"][str(i)] for i in range(3)) if model.config.num_labels else None
    pad = hf.get("pad_token_id")
    document = hf_checkpoint.config(model, hf, labels, pad)
    hf_checkpoint.save(tmp_path, model, params, document, FOLDER / name)
    ours, theirs = (safetensors.numpy.load_file(folder / "model.safetensors") for folder in (tmp_path, FOLDER / name))
    assert ours.keys() == theirs.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert document["architectures"] == hf["architectures"]
    assert isinstance(model, Decoder) == (not name.startswith(ENCODERS))


OLDER = {  # how files from before transformers 5 say the same: options that go, and options in their place
    "gemma3": {
        "rope_parameters": None, "layer_types": None, "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 3,
    },
    "gemma2": {"rope_parameters": None, "layer_types": None, "rope_theta": 10000.0, "hidden_act": "gelu_pytorch_tanh"},
    "gpt_neox": {"rope_parameters": None, "rotary_pct": 0.25, "rotary_emb_base": 10000, "partial_rotary_factor": None},
    "modernbert_mlm": {
        "rope_parameters": None, "layer_types": None, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0,
        "global_attn_every_n_layers": 3,
    },
    "phi3_long": {
        "rope_parameters": None, "rope_theta": 500.0, "partial_rotary_factor": 0.5,
        "rope_scaling": {"type": "su", "short_factor": [1.1, 1.3], "long_factor": [1.5, 3.0]},
    },
    "qwen3_window": {"rope_parameters": None, "layer_types": None, "rope_theta": 10000.0},
    "olmo3": {
        "rope_parameters": None, "layer_types": None, "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OLDER)
def test_the_older_spelling_of_a_config_is_the_same_model(name, tmp_path):
    shutil.copytree(FOLDER / name, tmp_path, dirs_exist_ok=True)
    hf = json.loads((tmp_path / "config.json").read_text()) | OLDER[name]
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in hf.items() if value is not None}))
    assert models.from_pretrained(tmp_path)[0] == load(name)[0]


@pytest.mark.parametrize(
    ("name", "pooling", "start"),
    [
        ("roberta_mlm", "mean", {"head"}),
        ("distilbert_mlm", "mean", {"head"}),
        ("modernbert_mlm", "pooler", {"head", "pooler"}),
    ],
)
def test_a_masked_language_model_becomes_a_classifier(name, pooling, start):
    model, params = models.from_pretrained(FOLDER / name, num_labels=4)
    assert model.config.pooling == pooling
    assert set(params) & {"head", "pooler", "mlm"} == start
    assert not params["head"]["kernel"].any()
    batch = load(name)[2]
    assert model.features(params, batch).shape == (3, 24)
    hidden = model.prefix(params, batch, 1)
    above = dataclasses.replace(model, start=1)
    params["head"]["kernel"] += 0.1 * np.arange(96).reshape(24, 4)
    whole = model.apply(params, batch)
    rest = {"hidden": hidden, "attention_mask": batch["attention_mask"]}
    np.testing.assert_allclose(above.apply(params, rest), whole, atol=1e-5)


@pytest.mark.parametrize("name", ["roberta_classifier", "distilbert_classifier"])
def test_a_head_that_peft_trained_whole_makes_a_bare_base_read_the_first_token(name, tmp_path):
    """PEFT's adapters are of a base without any head, whose `dense` transformers draws anew."""
    _, _, batch, golden = load(name)
    tensors = safetensors.numpy.load_file(FOLDER / name / "model.safetensors")
    body = {key: value for key, value in tensors.items() if "classifier" not in key}
    hf = json.loads((FOLDER / name / "config.json").read_text()) | {"architectures": None}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    safetensors.numpy.save_file(body, tmp_path / "model.safetensors")
    model, params = models.from_pretrained(tmp_path, num_labels=3)
    assert model.config.pooling == "mean"
    adapter, _ = peft.load(FOLDER / name / "adapter", model, params)
    np.testing.assert_allclose(model.apply(params, batch, adapter), golden["adapted_logits"], atol=2e-4)


def test_a_mean_pooled_roberta_is_written_as_the_bare_model(tmp_path):
    model, params = models.from_pretrained(FOLDER / "roberta_mlm", num_labels=3)
    hf = json.loads((FOLDER / "roberta_mlm" / "config.json").read_text())
    document = hf_checkpoint.config(model, hf, ("a", "b", "c"))
    hf_checkpoint.save(tmp_path, model, params, document, FOLDER / "roberta_mlm")
    assert document["architectures"] == ["RobertaModel"]
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    theirs = safetensors.numpy.load_file(FOLDER / "roberta_mlm" / "model.safetensors")
    assert {f"roberta.{name}" for name in tensors} == {name for name in theirs if name.startswith("roberta.")}


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "modernbert_mlm"])
def test_bfloat16_is_close_to_float32_and_its_logits_are_float32(name):
    _, _, batch, golden = load(name)
    model, params = models.from_pretrained(FOLDER / name, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    low = np.asarray(applied()(model, params, batch))
    assert low.dtype == np.float32
    exact = attended(batch, golden["logits"])
    assert 0 < np.abs(attended(batch, low) - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("rows", [8, 20])
def test_longrope_turns_by_the_length_of_the_rows_and_not_by_their_tokens(rows):
    model, params, batch, _ = load("phi3_long")  # whose short rows have 8 places
    batch = {name: np.pad(value, ((0, 0), (0, 20)))[:, :rows] for name, value in batch.items()}
    whole = np.asarray(model.apply(params, batch))
    alone = [
        np.asarray(model.apply(params, {name: value[i : i + 1] for name, value in batch.items()})) for i in range(3)
    ]
    np.testing.assert_allclose(whole, np.concatenate(alone), atol=1e-5)
    short = dataclasses.replace(model.config.rope, long=None)
    plain = dataclasses.replace(model, config=dataclasses.replace(model.config, rope=short))
    assert np.array_equal(plain.apply(params, batch), whole) == (rows <= 8)


def test_layers_that_are_all_local_turn_as_local_ones(tmp_path):
    _, params, batch, _ = load("gemma3")
    shutil.copytree(FOLDER / "gemma3", tmp_path, dirs_exist_ok=True)
    hf = json.loads((tmp_path / "config.json").read_text()) | {"layer_types": ["sliding_attention"] * 3}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    model = models.from_pretrained(tmp_path)[0]
    assert model.config.local is None
    marked = dataclasses.replace(model, config=dataclasses.replace(model.config, local=(True, True, True)))
    np.testing.assert_allclose(model.apply(params, batch), marked.apply(params, batch), atol=1e-5)


@pytest.mark.parametrize("name", ["roberta_classifier", "distilbert_classifier"])
def test_a_frozen_dense_layer_of_a_head_is_in_its_files_and_not_trained(name, tmp_path):
    model, params = models.from_pretrained(FOLDER / name, jnp.bfloat16)
    config = lora.LoraConfig(2, 4, ("q", "v"))
    adapter = lora.init(jax.random.key(0), model, params, config)
    assert set(adapter["head"]) == {"kernel", "bias"}
    peft.save(tmp_path, model, lora.with_frozen(params, adapter), config)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    dense = tensors[f"{peft.PREFIX}{model.head_dense}.weight"]
    np.testing.assert_array_equal(dense.T, params[lora.HEAD_DENSE]["kernel"])
    assert jax.tree.structure(peft.load(tmp_path, model, params)[0]) == jax.tree.structure(adapter)


@pytest.mark.parametrize("name", ["gemma3", "modernbert_classifier"])
def test_layers_of_two_kinds_start_above_a_prefix_and_take_few_bits(name):
    model, params, batch, _ = load(name)
    hidden = jax.jit(type(model).prefix, static_argnums=(0, 3))(model, params, batch, 2)
    rest = {"hidden": hidden, "attention_mask": batch["attention_mask"]}
    above = np.asarray(applied()(dataclasses.replace(model, start=2), params, rest))
    np.testing.assert_allclose(attended(batch, above), attended(batch, logits_of(name)), atol=5e-5)
    _, few = models.from_pretrained(FOLDER / name, quantize="int8")
    low = attended(batch, np.asarray(applied()(model, few, batch)))
    exact = attended(batch, logits_of(name))
    assert 0 < np.abs(low - exact).max() < 0.2 * np.abs(exact).max()
