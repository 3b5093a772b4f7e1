"""Llama (Touvron et al. 2023) and its variants: Llama 2 and 3, TinyLlama, SmolLM2, Qwen2, Mistral.

Letters: B rows, T tokens, S tokens that may be attended, D width, H query heads, G key and value heads, K head width.
"""

import dataclasses
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dplora_jax.errors import InputError
from dplora_jax.models import rope
from dplora_jax.models.decoder import Decoder, remember
from dplora_jax.models.family import Family, Gguf, Target, Weight, activation, given, number, refuse_unsupported, sizes
from dplora_jax.models.layers import ACTIVATIONS, Dense, RMSNorm, attention, rotate_halves, split_heads
from dplora_jax.models.rope import GLOBAL, LOCAL, Rope


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and choices of one Llama. With `window`, a token attends to itself and the window - 1 before it: in every layer, or
    in those that `local` marks, which turn by `local_rope` where there is one."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    max_positions: int
    rope: Rope
    activation: str = "silu"
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    local: tuple[bool, ...] | None = None
    local_rope: Rope | None = None
    tied: bool = False
    num_labels: int | None = None
    remat: bool = False


def attend(c, h, turn, mask_BxTxS, dense, state, norms=lambda q, k: (q, k), **how):
    """Attention of a block of config `c` on h [B, T, D] -> ([B, T, D], its cache). `dense(name, x, features, bias)` is an adapted
    matrix; `norms` are put on queries and keys before they `turn`; `how` is the attention's own."""
    heads = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads, "v_proj": c.num_kv_heads}
    q, k, v = (split_heads(dense(name, h, n * c.head_width, c.qkv_bias), n) for name, n in heads.items())
    q, k = (rotate_halves(y, *turn) for y in norms(q, k))
    k, v, state = remember(state, k, v)
    return dense("o_proj", attention(q, k, v, mask_BxTxS, **how), c.width, c.output_bias), state


def feed_forward(c, h, dense):
    """The gated feed-forward part of a block of config `c` (SwiGLU and its like, Shazeer 2020): [B, T, D] -> [B, T, D]."""
    gate = ACTIVATIONS[c.activation](dense("gate_proj", h, c.mlp_width, c.mlp_bias))
    return dense("down_proj", gate * dense("up_proj", h, c.mlp_width, c.mlp_bias), c.width, c.mlp_bias)


def adapted(pairs):
    """The `dense` of `attend` and `feed_forward` within a module, whose matrices `pairs` {target: lora.Pair} adapts."""
    pairs = pairs or {}
    return lambda name, x, features, bias: Dense(features, bias, name=name)(x, pairs.get(name))


class Block(nn.Module):
    """One pre-norm decoder layer; `turn` rotates its queries and keys, `pairs` adapts its matrices,
    `state` is its cache or None."""

    config: Any

    @nn.compact
    def __call__(self, x, turn, mask_BxTxS, pairs, state):
        c, dense = self.config, adapted(pairs)
        out, state = attend(c, RMSNorm(c.norm_eps, name="attention_norm")(x), turn, mask_BxTxS, dense, state)
        x = x + out
        return x + feed_forward(c, RMSNorm(c.norm_eps, name="mlp_norm")(x), dense), state


@dataclasses.dataclass(frozen=True)
class Llama(Decoder):
    """The model as pure functions of its parameters; see Decoder. A family of the same matrices has a `layer` of its own, and
    says which `norms` it has: {path in a layer: Hugging Face's name}."""

    layer: ClassVar = Block
    norms: ClassVar = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}

    def embed(self, params, batch):
        """Word embeddings: `input_ids` [B, T] -> [B, T, D]."""
        return jnp.take(params["embed"]["word"], batch["input_ids"], axis=0)

    def stack(self, params):
        """The layers' parameters, with which of them have a window where only some do."""
        local = self.config.local
        return params["layers"] if local is None else {"params": params["layers"], "local": jnp.asarray(local)}

    def block(self, layer, x, positions, mask, pairs, state):
        """One layer: x [B, T, D] -> (x, its cache)."""
        c = self.config
        tokens = jax.tree.leaves(mask)[0].shape[-1]
        all_local = c.window is not None and c.local is None and c.local_rope is not None
        turn = (c.local_rope if all_local else c.rope).turn(positions, tokens)
        if c.local is not None:
            (everywhere, near), local, layer = mask, layer["local"], layer["params"]
            mask = jnp.where(local, near, everywhere)
            if c.local_rope is not None:
                turn = [
                    jnp.where(local, *pair) for pair in zip(c.local_rope.turn(positions, tokens), turn, strict=True)
                ]
        return self.layer(c).apply({"params": layer}, x, turn, mask, pairs, state)

    def norm(self, params, x):
        """The norm above the last layer."""
        return RMSNorm(self.config.norm_eps).apply({"params": params["norm"]}, x)

    def init_layer(self, key):
        """Random parameters of one layer."""
        x, ones = jnp.zeros((1, 2, self.config.width)), jnp.ones((1, 2, 2), bool)
        turn = self.config.rope.turn(jnp.zeros((1, 2), jnp.int32), 2)
        return self.layer(self.config).init(key, x, turn, ones, None, None)["params"]

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
        return table + [
            Weight(("layers", ours, "scale"), f"model.layers.{{}}.{name}", "scale") for ours, name in self.norms.items()
        ]

    def outer_weights(self):
        """The rest of the checkpoint's names."""
        return [
            Weight(("embed", "word"), "model.embed_tokens", "embedding"),
            Weight(("norm", "scale"), "model.norm", "scale"),
        ]


def shared(hf):
    """The fields of a LlamaConfig that every family of its kind reads alike in `config.json` (a dict), but its rope."""
    width, num_layers, num_heads, mlp_width, vocab_size, max_positions = sizes(
        hf, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
        "max_position_embeddings",
    )  # fmt: skip
    (num_kv_heads,) = sizes(
        {"num_key_value_heads": num_heads} | given(hf, "num_key_value_heads"), "num_key_value_heads"
    )
    (head_width,) = sizes({"head_dim": width // num_heads} | given(hf, "head_dim"), "head_dim")
    if num_heads % num_kv_heads or head_width % 2 or (not hf.get("head_dim") and width % num_heads):
        raise InputError(
            f"config.json: {num_heads} heads do not go into hidden_size={width} or over num_key_value_heads={num_kv_heads}."
        )
    return {
        "vocab_size": vocab_size, "width": width, "num_layers": num_layers, "num_heads": num_heads,
        "num_kv_heads": num_kv_heads, "head_width": head_width, "mlp_width": mlp_width, "max_positions": max_positions,
        "activation": activation(hf, "hidden_act", "silu"), "norm_eps": number(hf, "rms_norm_eps", 1e-6),
        "tied": bool(hf.get("tie_word_embeddings")),
    }  # fmt: skip


def windows(hf, usual):
    """{"window", "local"} of a LlamaConfig: `sliding_window` in the layers that `layer_types` says, by default `usual`, a list of
    GLOBAL and LOCAL."""
    kinds = hf.get("layer_types") or usual
    if len(kinds) != len(usual) or not set(kinds) <= {GLOBAL, LOCAL}:
        raise InputError(
            f"config.json: layer_types={kinds!r} must be {GLOBAL} or {LOCAL} for each of {len(usual)} layers."
        )
    if LOCAL not in kinds:
        return {"window": None, "local": None}
    (window,) = sizes(hf, "sliding_window")
    return {"window": window, "local": tuple(kind == LOCAL for kind in kinds) if GLOBAL in kinds else None}


def qwen_windows(hf, layers):
    """`windows` of a Qwen2 or 3: of the layers from `max_window_layers` on, if `use_sliding_window` says that there are any."""
    first = hf.get("max_window_layers", 28) if hf.get("use_sliding_window") else layers
    if type(first) is not int:
        raise InputError(f"config.json: max_window_layers={first!r} must be a whole number.")
    return windows({"sliding_window": 4096} | hf, [LOCAL if i >= first else GLOBAL for i in range(layers)])


def from_config(hf, num_labels):
    """LlamaConfig from Hugging Face's `config.json` (a dict) of a llama, qwen2 or mistral; refuses by name what is not
    implemented."""
    kind = hf["model_type"]
    refuse_unsupported(hf, {"partial_rotary_factor": (None, 1, 1.0)})
    if kind != "llama":  # which has no such biases
        refuse_unsupported(
            hf, {"mlp_bias": (False, None)} | ({"attention_bias": (False, None)} if kind == "mistral" else {})
        )
    fields = shared(hf)
    layers, default = fields["num_layers"], {"sliding_window": 4096} | hf  # transformers' own
    near = kind == "mistral" and default["sliding_window"] is not None
    placed = qwen_windows(hf, layers) if kind == "qwen2" else windows(default, [LOCAL if near else GLOBAL] * layers)
    return LlamaConfig(
        **fields, **placed, rope=rope.read(hf, fields["head_width"]), num_labels=num_labels,
        qkv_bias=kind == "qwen2" or bool(hf.get("attention_bias")),
        output_bias=kind == "llama" and bool(hf.get("attention_bias")), mlp_bias=bool(hf.get("mlp_bias")),
    )  # fmt: skip


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


def _pairs(name, rows, heads, kv_heads):
    """Where llama.cpp keeps the rows of a Llama's q and k: it pairs neighbours (2i, 2i+1) of a head, the Hugging Face layout the
    halves (i, i + width/2); the converter reorders the rows from one to the other."""
    projection = re.fullmatch(r".*\.self_attn\.([qk])_proj\.\w+", name)
    if not projection:
        return None
    heads = heads if projection[1] == "q" else kv_heads
    if rows % (2 * heads):
        raise InputError(f"{name} has {rows} rows, which is not {heads} heads of an even width.")
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
    gguf_names={"mistral": "llama"},
)
