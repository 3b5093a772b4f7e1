"""The decoders against the reference implementations' logits; attention, rows, precision, prefixes; what is read and refused."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dplora_jax import lora, models
from dplora_jax.errors import InputError
from dplora_jax.models import layers, llama, parameters, pretrained
from dplora_jax.models.chatglm import Glm
from dplora_jax.models.chatglm2 import Glm2
from dplora_jax.models.decoder import Decoder
from tests.conftest import GOLDEN

pytestmark = pytest.mark.usefixtures("quick_compile")
jit = functools.partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": False})  # compiles in half the time
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


PUBLISHED = {  # numbers in all, and in PEFT's usual adapter of rank 8, as their authors and PEFT say; config.json's sizes
    "GPT-2": (124_439_808, 294_912, {
        "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
    }),
    "Mistral-7B": (7_241_732_096, 3_407_872, {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "sliding_window": 4096,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 32768,
    }),
    "Qwen2-0.5B": (494_032_768, 540_672, {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24, "tie_word_embeddings": True,
        "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "max_position_embeddings": 32768,
    }),
    "ChatGLM2-6B": (6_243_584_000, 1_949_696, {
        "model_type": "chatglm", "padded_vocab_size": 65024, "hidden_size": 4096, "num_layers": 28, "kv_channels": 128,
        "num_attention_heads": 32, "ffn_hidden_size": 13696, "seq_length": 32768, "multi_query_attention": True,
        "multi_query_group_num": 2, "add_qkv_bias": True,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(name):
    count, adapted, hf = PUBLISHED[name]
    model = pretrained.build(hf, None, None, jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert lora.count(shapes) == count
    config = lora.LoraConfig(8, 32, ("q", "v"))
    assert lora.count(jax.eval_shape(lambda: lora.init(jax.random.key(0), model, shapes, config))) == adapted


def refusal(tmp_path, name, changes=(), **options):
    """The one sentence with which a folder is refused once its config is changed; None removes an option."""
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | dict(changes)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(InputError) as caught:
        models.from_pretrained(tmp_path, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (GPT2, {"add_cross_attention": True}, "add_cross_attention=True"),
        (GPT2, {"activation_function": "foo"}, "activation_function='foo'"),
        (GPT2, {"n_head": 5}, "n_head=5"),
        (GPT2, {"model_type": "t5"}, "model_type='t5'"),
        (LLAMA, {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        (LLAMA, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        (LLAMA, {"rope_parameters": {"rope_type": "linear"}}, "incomplete"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA, {"hidden_act": "foo"}, "hidden_act='foo'"),
        (LLAMA, {"head_dim": None, "num_attention_heads": 5}, "5 heads"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ("variants/qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
        (LLAMA, {"num_key_value_heads": "2"}, "num_key_value_heads='2'"),
        (LLAMA, {"rope_parameters": [1]}, "rope_parameters=[1]"),
        (LLAMA, {"rope_parameters": None, "rope_theta": "1e4"}, "rope_theta='1e4'"),
        (LLAMA, {"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6'"),
        ("variants/qwen2", {"mlp_bias": True}, "mlp_bias=True"),
        (WINDOW, {"attention_bias": True}, "attention_bias=True"),
        (WINDOW, {"sliding_window": 0}, "sliding_window=0"),
        (WINDOW, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        (GLM, {"position_encoding_2d": False}, "position_encoding_2d=False"),
        (GLM, {"num_attention_heads": 5}, "num_attention_heads=5"),
        (GLM, {"quantization_bit": 4}, "quantization_bit=4"),
        (GLM2, {"rmsnorm": False}, "rmsnorm=False"),
        (GLM2, {"multi_query_group_num": 3}, "multi_query_group_num=3"),
        (GLM2, {"padded_vocab_size": None}, "padded_vocab_size=None"),  # its other keys tell the generation
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, name, changes, words):
    assert words in refusal(tmp_path, name, changes)


def test_what_a_config_leaves_unsaid_is_what_transformers_takes():
    sizes = dict.fromkeys(("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"), 8)
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 9}
    mistral, qwen2 = (llama.from_config(sizes | {"model_type": name}, None) for name in ("mistral", "qwen2"))
    assert mistral.window == 4096
    assert not mistral.qkv_bias
    assert qwen2.qkv_bias
    assert not qwen2.output_bias
    assert qwen2 == llama.from_config(sizes | {"model_type": "qwen2", "attention_bias": False}, None)


def test_the_two_chatglm_generations_are_told_apart_by_their_keys_and_neither_classifies(tmp_path):
    for name, family in ((GLM, Glm), (GLM2, Glm2)):
        assert type(load(name)[0]) is family
        assert "no classifier" in refusal(tmp_path / family.__name__, name, num_labels=3)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00008.bin"])
def test_a_pickled_checkpoint_is_refused_with_the_way_to_convert_it(tmp_path, file):
    shutil.copytree(GOLDEN / GLM2, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle.*save_pretrained, which writes safetensors"):
        models.from_pretrained(tmp_path)
