"""A GGUF file gives the tensors, the config and the tokenizer that its converter was given, or one sentence."""

import struct

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from dplora_jax.errors import InputError
from dplora_jax.models import gguf_file
from tests.models.gguf_writing import (
    BYTE_LEVEL,
    HEAD,
    HEADS,
    KV_HEADS,
    LAYERS,
    MLP,
    PLAIN,
    TENSORS,
    WIDTH,
    WORDS,
    normal,
    random_blocks,
    write,
)

Q, K = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


def refusal(call, *args):
    """The one sentence with which `call` is refused."""
    with pytest.raises(InputError) as caught:
        call(*args)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.name)
def test_a_quantised_tensor_is_what_its_blocks_say(tmp_path, kind):
    size = gguf.GGML_QUANT_SIZES[kind][1]
    values = normal(5, 64)
    only_decodes = kind in (Type.Q4_K, Type.Q6_K, Type.IQ4_NL)  # the library cannot write them
    stored = random_blocks(5, kind) if only_decodes else gguf.quants.quantize(values, kind)
    expected = [[v for block in row.reshape(-1, size) for v in PLAIN[kind](block)] for row in stored]
    with gguf_file.GgufCheckpoint(write(tmp_path / "m.gguf", {"output.weight": (stored, kind)})) as checkpoint:
        read = checkpoint.read("lm_head.weight")
        assert checkpoint.shape("lm_head.weight") == read.shape
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, expected, rtol=1e-6, atol=1e-6)
    if not only_decodes:
        np.testing.assert_allclose(read, values, atol=0.03 if kind is Type.Q8_0 else 0.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_floats_are_read_as_they_are_stored(tmp_path, dtype):
    value = normal(6, 32).astype(dtype)
    stored = (value.view(np.uint8), Type.BF16) if dtype == jnp.bfloat16 else value
    tensors = {"output.weight": stored, "output_norm.weight": TENSORS["output_norm.weight"]}
    with gguf_file.GgufCheckpoint(write(tmp_path / "m.gguf", tensors)) as checkpoint:
        read = checkpoint.read("lm_head.weight", slice(2, 5))
        norm = checkpoint.read("model.norm.weight", slice(3, 9))
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, value[2:5])
    np.testing.assert_array_equal(norm, TENSORS["output_norm.weight"][3:9])


def converted(weight, heads):
    """What the converter makes of a llama's q or k: the two halves of a head, interleaved."""
    return np.stack(np.split(weight.reshape(heads, HEAD, -1), 2, axis=1), axis=2).reshape(weight.shape)


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0])
@pytest.mark.parametrize("rows", [slice(None), slice(5, 14), slice(1, None, 3), slice(-3, None), slice(0, 1)])
def test_the_rotary_order_of_llamas_queries_and_keys_is_undone(tmp_path, kind, rows):
    original = {"attn_q": (normal(WIDTH, WIDTH), HEADS), "attn_k": (normal(KV_HEADS * HEAD, WIDTH), KV_HEADS)}
    tensors = {
        f"blk.1.{name}.weight": (gguf.quants.quantize(converted(w, heads), kind), kind)
        for name, (w, heads) in original.items()
    }
    bias = normal(WIDTH)
    tensors["blk.1.attn_q.bias"] = converted(bias, HEADS)
    with gguf_file.GgufCheckpoint(write(tmp_path / "m.gguf", tensors)) as checkpoint:
        for name, (weight, _) in zip((Q, K), original.values(), strict=True):
            expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
            np.testing.assert_array_equal(checkpoint.read(f"{name}.weight", rows), expected[rows])
        np.testing.assert_array_equal(checkpoint.read(f"{Q}.bias", rows), bias[rows])


def test_qwen2_keeps_its_order(tmp_path):
    with gguf_file.GgufCheckpoint(write(tmp_path / "m.gguf", architecture="qwen2")) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read(f"{Q}.weight"), TENSORS["blk.1.attn_q.weight"])


def test_every_tensor_has_its_hugging_face_name(tmp_path):
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm",
        "model.layers.1.self_attn.v_proj": "blk.1.attn_v", "model.layers.1.self_attn.o_proj": "blk.1.attn_output",
        "model.layers.1.mlp.gate_proj": "blk.1.ffn_gate", "model.layers.1.mlp.up_proj": "blk.1.ffn_up",
        "model.layers.1.mlp.down_proj": "blk.1.ffn_down", "model.layers.1.input_layernorm": "blk.1.attn_norm",
        "model.layers.1.post_attention_layernorm": "blk.1.ffn_norm",
    }  # fmt: skip
    with gguf_file.GgufCheckpoint(write(tmp_path / "m.gguf")) as checkpoint:
        for name, stored in names.items():
            np.testing.assert_array_equal(checkpoint.read(f"{name}.weight"), TENSORS[f"{stored}.weight"])
        assert not checkpoint.has("lm_head.weight")
        assert not checkpoint.has(f"{Q}.bias")
        assert checkpoint.directory == tmp_path / "m.gguf"
        assert "no tensor lm_head.weight" in refusal(checkpoint.read, "lm_head.weight")


def test_only_the_rows_asked_for_are_decoded(tmp_path, monkeypatch):
    decoded = []
    decode = gguf.quants.dequantize
    monkeypatch.setattr(
        gguf_file.quants, "dequantize", lambda rows, kind: decoded.append(len(rows)) or decode(rows, kind)
    )
    stored = gguf.quants.quantize(TENSORS["blk.1.attn_q.weight"], Type.Q8_0)
    tensors = {"blk.1.attn_q.weight": (stored, Type.Q8_0), "output.weight": (stored, Type.Q8_0)}
    with gguf_file.GgufCheckpoint(write(tmp_path / "m.gguf", tensors)) as checkpoint:
        checkpoint.read(f"{Q}.weight", slice(3, 7))
        checkpoint.read("lm_head.weight", slice(30, 40))
    assert decoded == [4, 2]


def test_the_metadata_become_a_config(tmp_path):
    assert gguf_file.config(write(tmp_path / "m.gguf")) == {
        "model_type": "llama", "vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": MLP,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "rope_theta": 10000.0,
        "rope_scaling": None, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "sliding_window": None, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip


def test_a_llama_file_with_a_window_is_a_mistral(tmp_path):
    config = gguf_file.config(write(tmp_path / "m.gguf", **{"llama.attention.sliding_window": 64}))
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 64)


def test_what_the_file_sets_stands_in_the_config(tmp_path):
    tensors = TENSORS | {"output.weight": normal(WORDS, WIDTH), "blk.0.attn_q.bias": normal(WIDTH)}
    tensors |= {"blk.0.ffn_gate.bias": normal(MLP)}
    metadata = {
        "qwen2.rope.freq_base": 1e6, "qwen2.attention.sliding_window": 64, "qwen2.attention.key_length": 16,
        "qwen2.attention.value_length": 16, "tokenizer.ggml.tokens": list("abcd"), "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 3,
    }  # fmt: skip
    sizes = {"attention.head_count_kv": None, "attention.head_count": [2, 2]}
    config = gguf_file.config(write(tmp_path / "m.gguf", tensors, "qwen2", **sizes, **metadata))
    expected = {
        "model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1e6,
        "sliding_window": 64, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rotary_scaling_is_passed_on_by_name(tmp_path, metadata, expected):
    path = write(tmp_path / "m.gguf", **{f"llama.{key}": value for key, value in metadata.items()})
    assert gguf_file.config(path)["rope_scaling"] == expected


def test_rotary_factors_are_passed_on(tmp_path):
    factors = {"rope_freqs.weight": np.array([1, 1, 3, 8], np.float32)}
    config = gguf_file.config(write(tmp_path / "m.gguf", TENSORS | factors))
    assert config["rope_scaling"] == {"rope_type": "frequency_factors", "factors": [1.0, 1.0, 3.0, 8.0]}
    both = write(tmp_path / "both.gguf", TENSORS | factors, **{"llama.rope.scaling.factor": 2.0})
    assert "rope_freqs.weight together with linear" in refusal(gguf_file.config, both)
    short = write(tmp_path / "short.gguf", TENSORS | {"rope_freqs.weight": np.ones(3, np.float32)})
    assert "expected F32 (4,)" in refusal(gguf_file.config, short)
    long = {"rope_factors_long.weight": np.ones(4, np.float32)}
    assert "rope_factors_short.weight is missing" in refusal(
        gguf_file.config, write(tmp_path / "l.gguf", TENSORS | long)
    )
    long |= {"rope_factors_short.weight": np.ones(4, np.float32)}
    assert gguf_file.config(write(tmp_path / "b.gguf", TENSORS | long))["rope_scaling"]["rope_type"] == "longrope"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "gemma"}, "general.architecture='gemma'"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count=4"),
        ({"llama.attention.value_length": 4}, "llama.attention.value_length=4"),
        ({"attention.head_count": None}, "llama.attention.head_count=None"),
        ({"attention.head_count": [2, 4]}, "llama.attention.head_count=[2, 4]"),
        ({"feed_forward_length": 0}, "llama.feed_forward_length=0"),
        ({"attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon=None"),
        ({"llama.rope.freq_base": 0.0}, "llama.rope.freq_base=0.0"),
        ({"block_count": 1}, "tensor blk.1."),
        ({"split.count": 2}, "one of several parts"),
        ({"tensors": TENSORS | {"blk.0.attn_q_norm.weight": normal(HEAD)}}, "tensor blk.0.attn_q_norm.weight"),
        ({"tensors": TENSORS | {"blk.0.attn_norm.bias": normal(WIDTH)}}, "tensor blk.0.attn_norm.bias"),
        ({"tensors": {"output_norm.weight": normal(WIDTH)}}, "no tensor token_embd.weight"),
        ({"tensors": {"output.weight": (np.zeros((2, 64), np.int8), Type.I8)}}, "output.weight has the type I8"),
        ({"llama.attention.causal": False}, "llama.attention.causal=False is not supported, only True"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale=0.5"),
        ({"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping=30.0"),
        ({"llama.embedding_scale": 12.0}, "llama.embedding_scale=12.0"),
        ({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.eos_token_id": 1}, "eos token id is 1 of 1"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, changes, words):
    assert words in refusal(gguf_file.config, write(tmp_path / "m.gguf", **changes))


def test_heads_that_do_not_fit_the_tensor_are_refused(tmp_path):
    with gguf_file.GgufCheckpoint(write(tmp_path / "m.gguf", **{"attention.head_count": 5})) as checkpoint:
        assert "is not 5 heads" in refusal(checkpoint.read, f"{Q}.weight")


def read_all(path):
    """Everything that a model's load asks of the file."""
    gguf_file.config(path)
    with gguf_file.GgufCheckpoint(path) as checkpoint:
        for name in ("model.norm.weight", f"{K}.weight", "model.embed_tokens.weight"):
            checkpoint.read(name)
    gguf_file.tokenizer(path)


def whole(directory):
    stored = {"token_embd.weight": (gguf.quants.quantize(TENSORS["token_embd.weight"], Type.Q4_1), Type.Q4_1)}
    tokens = {f"tokenizer.ggml.{key}": value for key, value in BYTE_LEVEL.items()}
    return write(directory / "m.gguf", TENSORS | stored, **tokens)


@pytest.mark.parametrize("size", [0, 3, 20, 40, 300, 4000, 9000, 20000])
def test_a_truncated_file_is_one_sentence(tmp_path, size):
    path = whole(tmp_path)
    read_all(path)
    content = path.read_bytes()
    assert len(content) > 25000
    path.write_bytes(content[:size])
    sentence = refusal(read_all, path)
    assert str(path) in sentence
    assert "copy or download it again" in sentence or size == 0


def test_random_damage_is_one_sentence_or_harmless(tmp_path):
    path = whole(tmp_path)
    content, rng = np.frombuffer(path.read_bytes(), np.uint8), np.random.default_rng(1)
    refused = 0
    for at in rng.integers(0, 8000, 60):
        damaged = content.copy()
        damaged[at : at + 4] = rng.integers(0, 256, 4)
        path.write_bytes(damaged.tobytes())
        try:
            read_all(path)
        except InputError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    ("name", "shape", "kind", "other"),
    [
        ("token_embd.weight", (WIDTH, WORDS), Type.Q8_0, (WIDTH + 1, WORDS)),
        ("token_embd.weight", (WIDTH, WORDS), Type.F32, (0, WORDS)),
        ("output_norm.weight", (WIDTH,), Type.Q8_0, (WIDTH,)),
    ],
)
def test_a_shape_that_no_tensor_has_is_damage(tmp_path, name, shape, kind, other):
    path = write(tmp_path / "m.gguf")
    content = path.read_bytes()
    described = name.encode() + struct.pack(f"<I{len(shape)}QI", len(shape), *shape, Type.F32)
    assert content.count(described) == 1
    path.write_bytes(
        content.replace(described, name.encode() + struct.pack(f"<I{len(shape)}QI", len(shape), *other, kind))
    )
    assert f"tensor {name} has shape {other[::-1]}" in refusal(gguf_file.config, path)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\3\4" + bytes(100))
    assert "is not a GGUF file" in refusal(gguf_file.config, tmp_path / "m.gguf")
    assert "cannot be read" in refusal(gguf_file.config, tmp_path / "none.gguf")
    content = bytearray(write(tmp_path / "big.gguf").read_bytes())
    content[4:8] = (3).to_bytes(4, "big")
    (tmp_path / "big.gguf").write_bytes(content)
    assert "GGUF version" in refusal(gguf_file.config, tmp_path / "big.gguf")
