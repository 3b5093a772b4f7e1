"""Llama (Touvron et al. 2023) and its variants: Llama 2 and 3, TinyLlama, SmolLM2, Qwen2, Mistral.

Letters: B rows, T tokens, S tokens that may be attended, D width, H query heads, G key and value heads, K head width.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dplora_jax.errors import InputError
from dplora_jax.models.decoder import Decoder, remember
from dplora_jax.models.family import Family, Gguf, Target, Weight, activation, number, refuse_unsupported, sizes
from dplora_jax.models.layers import ACTIVATIONS, Dense, RMSNorm, attention, rotate_halves, rotation, split_heads


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and choices of one Llama; `frequencies` [K/2] are its rotary frequencies in radians a position, scaling included;
    with `window`, a token attends to itself and the window - 1 before it."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    max_positions: int
    frequencies: tuple[float, ...]
    activation: str = "silu"
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    tied: bool = False
    num_labels: int | None = None
    remat: bool = False


class Block(nn.Module):
    """One pre-norm decoder layer; `pairs` {target: lora.Pair} adapts its matrices, `state` is its cache or None."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x, positions_BxT, mask_BxTxS, pairs, state):
        c, pairs = self.config, pairs or {}

        def dense(name, x, features, bias):
            return Dense(features, bias, name=name)(x, pairs.get(name))

        h = RMSNorm(c.norm_eps, name="attention_norm")(x)
        heads = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads, "v_proj": c.num_kv_heads}
        q, k, v = (split_heads(dense(name, h, n * c.head_width, c.qkv_bias), n) for name, n in heads.items())
        cos, sin = rotation(positions_BxT, c.frequencies)
        q, k = rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)
        k, v, state = remember(state, k, v)
        x = x + dense("o_proj", attention(q, k, v, mask_BxTxS), c.width, c.output_bias)
        h = RMSNorm(c.norm_eps, name="mlp_norm")(x)
        gate = ACTIVATIONS[c.activation](dense("gate_proj", h, c.mlp_width, c.mlp_bias))
        return x + dense("down_proj", gate * dense("up_proj", h, c.mlp_width, c.mlp_bias), c.width, c.mlp_bias), state


@dataclasses.dataclass(frozen=True)
class Llama(Decoder):
    """The model as pure functions of its parameters; see Decoder."""

    def embed(self, params, batch):
        """Word embeddings: `input_ids` [B, T] -> [B, T, D]."""
        return jnp.take(params["embed"]["word"], batch["input_ids"], axis=0)

    def block(self, layer, x, positions, mask, pairs, state):
        """One layer: x [B, T, D] -> (x, its cache)."""
        return Block(self.config).apply({"params": layer}, x, positions, mask, pairs, state)

    def norm(self, params, x):
        """The norm above the last layer."""
        return RMSNorm(self.config.norm_eps).apply({"params": params["norm"]}, x)

    def init_layer(self, key):
        """Random parameters of one layer."""
        x, ones = jnp.zeros((1, 2, self.config.width)), jnp.ones((1, 2, 2), bool)
        return Block(self.config).init(key, x, jnp.zeros((1, 2), jnp.int32), ones, None, None)["params"]

    def init_outer(self, key):
        """Random embeddings and the last norm."""
        c = self.config
        word = 0.02 * jax.random.normal(key, (c.vocab_size, c.width))
        return {"embed": {"word": word}, "norm": {"scale": jnp.ones(c.width)}}

    @property
    def targets(self):
        """The matrices that an adapter may name: {target: Target}."""
        c, prefix = self.config, "model.layers.{}."
        inner, kv = c.num_heads * c.head_width, c.num_kv_heads * c.head_width
        shapes = {
            "self_attn.q_proj": (c.width, inner), "self_attn.k_proj": (c.width, kv), "self_attn.v_proj": (c.width, kv),
            "self_attn.o_proj": (inner, c.width), "mlp.gate_proj": (c.width, c.mlp_width),
            "mlp.up_proj": (c.width, c.mlp_width), "mlp.down_proj": (c.mlp_width, c.width),
        }  # fmt: skip
        names = {module: module.split(".")[1] for module in shapes}
        return {
            name: Target((name, "kernel"), shapes[module], (name.removesuffix("_proj"), name), prefix + module)
            for module, name in names.items()
        }

    def layer_weights(self):
        """The layers' part of the checkpoint's names."""
        c = self.config
        table = [Weight(("layers", name, "kernel"), target.module, "kernel") for name, target in self.targets.items()]
        biased = {"self_attn.o_proj": c.output_bias, "mlp.": c.mlp_bias}
        table += [
            Weight(("layers", name, "bias"), target.module, "bias")
            for name, target in self.targets.items()
            if next((on for part, on in biased.items() if part in target.module), c.qkv_bias)
        ]
        norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        return table + [
            Weight(("layers", ours, "scale"), f"model.layers.{{}}.{name}", "scale") for ours, name in norms.items()
        ]

    def outer_weights(self):
        """The rest of the checkpoint's names."""
        return [
            Weight(("embed", "word"), "model.embed_tokens", "embedding"),
            Weight(("norm", "scale"), "model.norm", "scale"),
        ]


def from_config(hf, num_labels):
    """LlamaConfig from Hugging Face's `config.json` (a dict) of a llama, qwen2 or mistral; refuses by name what is not
    implemented."""
    kind = hf["model_type"]
    refuse_unsupported(hf, {"partial_rotary_factor": (None, 1, 1.0), "use_sliding_window": (False, None)})
    if kind != "llama":  # which has no such biases
        refuse_unsupported(
            hf, {"mlp_bias": (False, None)} | ({"attention_bias": (False, None)} if kind == "mistral" else {})
        )
    width, num_layers, num_heads, mlp_width, vocab_size, max_positions = sizes(
        hf, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
        "max_position_embeddings",
    )  # fmt: skip
    (num_kv_heads,) = sizes(
        {"num_key_value_heads": num_heads} | _given(hf, "num_key_value_heads"), "num_key_value_heads"
    )
    (head_width,) = sizes({"head_dim": width // num_heads} | _given(hf, "head_dim"), "head_dim")
    if num_heads % num_kv_heads or head_width % 2 or (not hf.get("head_dim") and width % num_heads):
        raise InputError(
            f"config.json: {num_heads} heads do not go into hidden_size={width} or over num_key_value_heads={num_kv_heads}."
        )
    # Qwen2's file names a window that only `use_sliding_window` (refused above) would turn on.
    window = hf.get("sliding_window", 4096) if kind == "mistral" else None  # transformers' own default
    if window is not None:
        sizes(hf | {"sliding_window": window}, "sliding_window")
    expected_type = "sliding_attention" if window else "full_attention"
    if set(hf.get("layer_types") or [expected_type]) != {expected_type}:
        raise InputError(
            f"config.json: layer_types={hf['layer_types']} is not supported, only {expected_type} in every layer."
        )
    return LlamaConfig(
        vocab_size, width, num_layers, num_heads, num_kv_heads, head_width, mlp_width, max_positions,
        frequencies(hf, head_width), activation(hf, "hidden_act", "silu"), number(hf, "rms_norm_eps", 1e-6),
        kind == "qwen2" or bool(hf.get("attention_bias")), kind == "llama" and bool(hf.get("attention_bias")),
        bool(hf.get("mlp_bias")), window, bool(hf.get("tie_word_embeddings")), num_labels,
    )  # fmt: skip


def _given(hf, name):
    return {} if hf.get(name) is None else {name: hf[name]}


def frequencies(hf, head_width):
    """Rotary frequencies in radians a position, [K/2] floats, as config.json's old or new spelling scales them.

    `linear` divides all by its factor (Chen et al. 2023); `llama3` only the slow ones, with a ramp between (Llama 3.1).
    `dynamic` is refused: it looks at the longest row of a batch, and no row may see another. Raises InputError on others.
    """
    # Of the two spellings, transformers takes the older, whole: nothing of the other adds to it, not even its rope_theta.
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise InputError(f"config.json: the rope scaling {scaling!r} is not one set of options for all layers.")
    refuse_unsupported(scaling, {"partial_rotary_factor": (None, 1, 1.0)})  # where transformers 5 writes it
    theta = number(_given(hf, "rope_theta") | _given(scaling, "rope_theta"), "rope_theta", 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    # A length beside the options wins over theirs; where neither has one, all positions count.
    length = {"original_max_position_embeddings": hf.get("max_position_embeddings")} | scaling
    scaling = length | _given(hf, "original_max_position_embeddings")
    base = [theta ** (-2 * i / head_width) for i in range(head_width // 2)]
    try:
        if kind == "default":
            return tuple(base)
        if kind == "linear":
            return tuple(f / scaling["factor"] for f in base)
        if kind == "frequency_factors":  # of a GGUF file
            return tuple(f / divisor for f, divisor in zip(base, scaling["factors"], strict=True))
        if kind == "llama3":
            return tuple(_llama3(f, scaling) for f in base)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        raise InputError(f"config.json: the rope scaling {scaling} is incomplete.") from None
    raise InputError(f"config.json: rope_type={kind!r} is not supported, only default, linear or llama3.")


def _llama3(frequency, scaling):
    """One frequency: kept where its wave is short, divided where it is long, blended between."""
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    waves = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    share = min(max((waves - low) / (high - low), 0.0), 1.0)
    return (1 - share) * frequency / factor + share * frequency


def build(hf, checkpoint, num_labels, dtype):
    """The Llama that config.json `hf` describes."""
    return Llama(from_config(hf, num_labels), dtype)


MODULES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_MODULES = {
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    **{"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
}
PROJECTIONS = tuple(
    f"{part}_{name}"
    for part, names in (("attn", ("q", "k", "v", "output")), ("ffn", ("gate", "up", "down")))
    for name in names
)
GGUF = Gguf(MODULES, LAYER_MODULES, biased=PROJECTIONS)


def _mistral(header, common):
    """llama.cpp has one name for both; only a Mistral has a window."""
    return common | ({"model_type": "mistral"} if common["sliding_window"] else {})


def _pairs(header, name, rows):
    """Where llama.cpp keeps the rows of a Llama's q and k: it pairs neighbours (2i, 2i+1) of a head, the Hugging Face layout the
    halves (i, i + width/2); the converter reorders the rows from one to the other."""
    projection = re.fullmatch(r".*\.self_attn\.([qk])_proj\.\w+", name)
    if not projection:
        return None
    heads = header.size("attention.head_count")
    heads = heads if projection[1] == "q" else header.size("attention.head_count_kv", heads)
    if rows % (2 * heads):
        raise InputError(f"{header.path}: {name} has {rows} rows, which is not {heads} heads of an even width.")
    head, inside = np.divmod(np.arange(rows), rows // heads)
    half, pair = np.divmod(inside, rows // heads // 2)
    return head * (rows // heads) + 2 * pair + half


FAMILY = Family(
    {
        "llama": ("LlamaForCausalLM", "LlamaForSequenceClassification"),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
        "mistral": ("MistralForCausalLM", "MistralForSequenceClassification"),
    },
    build,
    gguf={"llama": dataclasses.replace(GGUF, document=_mistral, order=_pairs), "qwen2": GGUF},
)
