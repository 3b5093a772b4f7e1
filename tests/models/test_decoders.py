"""The decoders against the reference implementations' logits; attention, rows, precision, prefixes; what is read."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dplora_jax import lora, models
from dplora_jax.models import layers, parameters
from dplora_jax.models.decoder import Decoder
from tests.compilation import jit
from tests.conftest import GOLDEN

pytestmark = pytest.mark.usefixtures("quick_compile")
apply = jit(Decoder.apply, static_argnums=0)
VARIANTS = sorted(f"variants/{path.name}" for path in (GOLDEN / "variants").glob("[!b]*"))  # all but BERT's
GOLDENS = ("gpt2_tiny", "llama_tiny", "chatglm_tiny", "chatglm2_tiny", *VARIANTS)
GPT2, LLAMA, GLM, GLM2, WINDOW = *GOLDENS[:4], "variants/mistral_window"
goldens = pytest.mark.parametrize("name", GOLDENS)
families = pytest.mark.parametrize("name", [GPT2, LLAMA, WINDOW, GLM, GLM2])


@functools.cache
def load(name):
    """(model, params, batch, reference logits) of a folder."""
    model, params = models.from_pretrained(GOLDEN / name)
    with np.load(GOLDEN / name / "golden.npz") as file:
        batch = {key: np.asarray(file[key]) for key in file.keys() - {"logits", "generated"}}
        return model, params, batch, file["logits"]


def with_mask(name, mask=None):
    """A folder's model, and its ids with a [B, T] mask: by default one that hides both ends of row 0 and the end of row 1."""
    model, params, batch, _ = load(name)
    if mask is None:
        mask = np.ones_like(batch["input_ids"])
        mask[0, :2] = mask[0, -3:] = mask[1, -7:] = 0
    return model, params, {"input_ids": batch["input_ids"], "attention_mask": mask}


def trained(model, params, config):
    rng = np.random.default_rng(0)
    adapter = lora.init(jax.random.key(0), model, params, config)
    return jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32), adapter)


@goldens
def test_logits_agree_with_the_reference_on_attended_positions(name):
    model, params, batch, logits = load(name)
    mask = batch.get("attention_mask")
    kept = slice(None) if logits.ndim == 2 or mask is None or mask.ndim == 4 else mask == 1
    np.testing.assert_allclose(apply(model, params, batch)[kept], logits[kept], atol=5e-5)


@pytest.mark.parametrize("name", [name for name in GOLDENS if (GOLDEN / name / "config_old.json").exists()])
def test_the_older_spelling_of_a_config_is_the_same_model(name, tmp_path):
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config_old.json").rename(tmp_path / "config.json")
    assert models.from_pretrained(tmp_path)[0] == load(name)[0]


@functools.partial(jit, static_argnums=0)
def reach(model, params, ids):
    """[T, T] bool: whether what is said at t depends on the (distinct) token at s: a gradient that is not exactly zero."""
    direction = np.random.default_rng(0).normal(size=(len(ids), model.config.width)).astype(np.float32)

    def outputs(word):
        hidden = model.hidden(params | {"embed": params["embed"] | {"word": word}}, {"input_ids": ids[None]})
        return (hidden[0] * direction).sum(1)

    return jax.jacrev(outputs)(params["embed"]["word"])[:, ids].any(-1)


BEHIND = np.arange(12)[:, None] - np.arange(12)
PREFIX = [10, 11, 12, 139, 140, *range(13, 20)]  # the start token 140 ends the prefix of four


@pytest.mark.parametrize(
    ("name", "ids", "expected"),
    [
        ("variants/gpt2_untied", range(12), BEHIND >= 0),
        ("variants/llama_mqa", range(12), BEHIND >= 0),
        (GLM2, range(12), BEHIND >= 0),
        (WINDOW, range(12), (BEHIND >= 0) & (BEHIND <= 2 * 3)),  # two layers, each three tokens back
        (GLM, PREFIX, (BEHIND >= 0) | (np.arange(12) < 4)),
        (GLM, [*PREFIX[:4], 41, *PREFIX[5:]], BEHIND >= 0),
    ],
    ids=["gpt2", "llama", "chatglm2", "window", "prefix", "prefix without a start token"],
)
def test_gradients_for_tokens_that_must_not_be_seen_are_exactly_zero(name, ids, expected):
    np.testing.assert_array_equal(reach(*load(name)[:2], jnp.array(ids)), expected)


@families
def test_masked_tokens_change_no_logit_of_an_attended_one(name):
    model, params, batch = with_mask(name)
    attended = batch["attention_mask"] == 1
    other = batch | {"input_ids": np.where(attended, batch["input_ids"], (batch["input_ids"] + 7) % 61)}
    before, after = (np.asarray(apply(model, params, b))[attended] for b in (batch, other))
    np.testing.assert_array_equal(before, after)
    all_seen = apply(*with_mask(name, np.ones_like(attended, int)))
    assert np.abs(before - np.asarray(all_seen)[attended]).max() > 1e-3


@families
def test_rows_do_not_mix(name):
    model, params, batch = with_mask(name)
    other = batch | {"input_ids": batch["input_ids"].copy()}
    other["input_ids"][1, 3] = 10**6  # beyond the vocabulary: nan
    before, after = (np.asarray(apply(model, params, b)) for b in (batch, other))
    np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
    assert np.isnan(after[1, 3:]).all()


@pytest.mark.parametrize("name", [GPT2, LLAMA, GLM, GLM2])
def test_bfloat16_is_close_to_float32_and_its_logits_are_float32(name):
    exact = np.asarray(apply(*with_mask(name)))
    batch = with_mask(name)[2]
    model, params = models.from_pretrained(GOLDEN / name, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.eval_shape(lambda: model.hidden(params, batch)).dtype == jnp.bfloat16
    low = apply(model, params, batch)
    assert low.dtype == jnp.float32
    attended = batch["attention_mask"] == 1
    assert 0 < np.abs(np.asarray(low) - exact)[attended].max() < 0.05 * np.abs(exact[attended]).max()


def test_rematerialisation_gives_the_same_values_and_gradients():
    model, params, batch = with_mask("variants/llama_mqa")
    adapter = trained(model, params, lora.LoraConfig(2, 2))
    results = []
    for remat in (False, True):
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=remat))
        value = lambda a, model=model: jnp.square(model.apply(params, batch, a)).mean()  # noqa: E731
        traced = jit(jax.value_and_grad(value)).trace(adapter)
        assert ("remat" in str(traced.jaxpr)) == remat
        results.append(traced.lower().compile()(adapter))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)


def test_scanned_layers_equal_unrolled_ones(monkeypatch):
    model, params, batch = with_mask("variants/gpt2_scaled")  # whose layers differ in more than parameters
    adapter = trained(model, params, lora.LoraConfig(4, 8, last_layers=1))
    results = []
    for unrolled in (3, 0):
        monkeypatch.setattr(layers, "SHALLOW", unrolled)
        traced = jit(lambda adapter: model.apply(params, batch, adapter)).trace(adapter)
        assert ("scan[" in str(traced.jaxpr)) == (not unrolled)
        results.append(np.asarray(traced.lower().compile()(adapter)))
    np.testing.assert_allclose(*results, atol=2e-5)


@pytest.mark.parametrize(("name", "depth"), [(GPT2, 3), (GLM, 2), ("variants/llama_classifier", 1)])
def test_starting_above_a_prefix_equals_the_whole(name, depth):
    model, params, batch = with_mask(name)
    hidden = jit(Decoder.prefix, static_argnums=(0, 3))(model, params, batch, depth)
    rest = batch | {"hidden": hidden}
    if name != GLM:  # whose rows tell where their prefixes end
        del rest["input_ids"]
    above = apply(dataclasses.replace(model, start=depth), params, rest)
    np.testing.assert_allclose(above, apply(model, params, batch), atol=1e-5)


def test_chatglm_derives_the_references_own_positions_and_mask():
    model, params, batch, _ = load(GLM)
    bare = {"input_ids": batch["input_ids"]}
    order = np.broadcast_to(np.arange(17), (3, 17))
    np.testing.assert_array_equal(model.positions(bare, order), batch["position_ids"])
    np.testing.assert_array_equal(model.mask(bare, order, order, order >= 0), ~batch["attention_mask"][:, 0])
    np.testing.assert_allclose(apply(model, params, bare), apply(model, params, batch), atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "positions", "block"),
    [
        ([5, 139, 6, 140, 7, 8], [0, 1, 2, 1, 1, 1], [0, 0, 0, 1, 2, 3]),
        ([138, 5, 139, 140, 7, 8], [0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]),  # [gMASK] goes before [MASK]
        ([5, 138, 6, 140, 7, 138], [0, 1, 2, 1, 1, 1], [0, 0, 0, 1, 2, 3]),
        ([5, 6, 140, 7, 8, 9], [0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 3, 4]),
        ([5, 6, 7, 8, 9, 10], [0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]),
    ],
)
def test_chatglm_positions_by_hand(ids, positions, block):
    derived = load(GLM)[0].positions({"input_ids": np.array([ids])}, np.arange(6)[None])
    np.testing.assert_array_equal(derived, [[positions, block]])


@goldens
def test_every_tensor_is_read_whatever_the_size_of_the_pieces(name, monkeypatch):
    model, params = load(name)[:2]
    monkeypatch.setattr(parameters, "CHUNK_BYTES", 1000)
    jax.tree.map(np.testing.assert_array_equal, models.from_pretrained(GOLDEN / name)[1], params)
    files = [safetensors.numpy.load_file(path) for path in (GOLDEN / name).glob("*.safetensors")]
    held = sum(tensor.size for file in files for key, tensor in file.items() if not key.endswith("inv_freq"))
    assert held == lora.count(params)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)


def test_a_language_model_becomes_a_classifier_without_bias_whose_head_is_zero():
    _, params = models.from_pretrained(GOLDEN / LLAMA, num_labels=4)
    assert params.keys() == {"embed", "norm", "layers", "head"}
    assert {part: value.shape for part, value in params["head"].items()} == {"kernel": (48, 4)}
    assert not params["head"]["kernel"].any()
