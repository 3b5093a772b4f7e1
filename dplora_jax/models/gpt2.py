"""GPT-2 (Radford et al. 2019) with Hugging Face's weights and meaning.

Letters: B rows, T tokens, S tokens that may be attended, L layers, D width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dplora_jax.errors import InputError
from dplora_jax.models.decoder import Decoder, OwnHeads, remember
from dplora_jax.models.family import Family, Gguf, Target, Weight, activation, number, refuse_unsupported, sizes
from dplora_jax.models.layers import ACTIVATIONS, Dense, LayerNorm, attention, split_heads

ALIASES = {  # transformers' second names for sizes
    "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Gpt2Config(OwnHeads):
    """Sizes and choices of one GPT-2; `scale_by_layer` divides the scores of layer i by i + 1."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    max_positions: int
    activation: str = "gelu_new"
    norm_eps: float = 1e-5
    scale_scores: bool = True
    scale_by_layer: bool = False
    tied: bool = True
    num_labels: int | None = None
    remat: bool = False


class Block(nn.Module):
    """One pre-norm decoder layer; `pairs` {target: lora.Pair} adapts its matrices, `state` is its cache or None."""

    config: Gpt2Config

    @nn.compact
    def __call__(self, x, scale, mask_BxTxS, pairs, state):
        c, pairs = self.config, pairs or {}
        h = LayerNorm(c.norm_eps, name="attention_norm")(x)
        qkv = Dense(3 * c.width, name="c_attn")(h, pairs.get("c_attn"))
        q, k, v = (split_heads(part, c.num_heads) for part in jnp.split(qkv, 3, -1))
        k, v, state = remember(state, k, v)
        out = attention(q, k, v, mask_BxTxS, scale)
        x = x + Dense(c.width, name="c_proj")(out, pairs.get("c_proj"))
        h = LayerNorm(c.norm_eps, name="mlp_norm")(x)
        h = ACTIVATIONS[c.activation](Dense(c.mlp_width, name="up")(h, pairs.get("up")))
        return x + Dense(c.width, name="down")(h, pairs.get("down")), state


@dataclasses.dataclass(frozen=True)
class Gpt2(Decoder):
    """The model as pure functions of its parameters; see Decoder."""

    fan_in_fan_out = True

    def embed(self, params, batch):
        """Word + position embeddings: `input_ids` [B, T] -> [B, T, D]."""
        ids = batch["input_ids"]
        positions = batch.get("position_ids", jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape))
        table = params["embed"]
        return jnp.take(table["word"], ids, axis=0) + jnp.take(table["position"], positions, axis=0)

    def stack(self, params):
        """The layers' parameters with the factor on each one's attention scores."""
        c = self.config
        scale = np.full(c.num_layers, c.head_width**-0.5 if c.scale_scores else 1.0, np.float32)
        return {
            "params": params["layers"],
            "scale": jnp.asarray(scale / np.arange(1, c.num_layers + 1) if c.scale_by_layer else scale),
        }

    def block(self, layer, x, positions, mask, pairs, state):
        """One layer: x [B, T, D] -> (x, its cache)."""
        return Block(self.config).apply({"params": layer["params"]}, x, layer["scale"], mask, pairs, state)

    def norm(self, params, x):
        """The norm above the last layer."""
        return LayerNorm(self.config.norm_eps).apply({"params": params["norm"]}, x)

    def init_layer(self, key):
        """Random parameters of one layer."""
        x = jnp.zeros((1, 2, self.config.width))
        return Block(self.config).init(key, x, 1.0, jnp.ones((1, 2, 2), bool), None, None)["params"]

    def init_outer(self, key):
        """Random embeddings and the last norm."""
        c, keys = self.config, jax.random.split(key)
        rows = {"word": c.vocab_size, "position": c.max_positions}
        embed = {
            name: 0.02 * jax.random.normal(k, (n, c.width)) for (name, n), k in zip(rows.items(), keys, strict=True)
        }
        norm = LayerNorm(c.norm_eps).init(key, jnp.zeros((1, c.width)))["params"]
        return {"embed": embed, "norm": norm}

    @property
    def targets(self):
        """The matrices that an adapter may name: {target: Target}; q, k and v are one, fused, as in PEFT."""
        d, m, prefix = self.config.width, self.config.mlp_width, "transformer.h.{}."
        return {
            "c_attn": Target(("c_attn", "kernel"), (d, 3 * d), ("q", "k", "v", "c_attn"), prefix + "attn.c_attn"),
            "c_proj": Target(("c_proj", "kernel"), (d, d), ("o", "c_proj"), prefix + "attn.c_proj"),
            "up": Target(("up", "kernel"), (d, m), ("up", "c_fc"), prefix + "mlp.c_fc"),
            "down": Target(("down", "kernel"), (m, d), ("down",), prefix + "mlp.c_proj"),
        }

    def layer_weights(self):
        """The layers' part of the checkpoint's names."""
        modules = {name: target.module for name, target in self.targets.items()}
        table = [Weight(("layers", ours, "kernel"), name, "conv1d") for ours, name in modules.items()]
        table += [Weight(("layers", ours, "bias"), name, "bias") for ours, name in modules.items()]
        norms = {"attention_norm": "transformer.h.{}.ln_1", "mlp_norm": "transformer.h.{}.ln_2"}
        return table + [
            Weight(("layers", ours, "norm", part), name, part)
            for ours, name in norms.items()
            for part in ("scale", "bias")
        ]

    def outer_weights(self):
        """The rest of the checkpoint's names."""
        return [
            Weight(("embed", "word"), "transformer.wte", "embedding"),
            Weight(("embed", "position"), "transformer.wpe", "embedding"),
            *(Weight(("norm", "norm", part), "transformer.ln_f", part) for part in ("scale", "bias")),
        ]


def from_config(hf, num_labels):
    """Gpt2Config from Hugging Face's `config.json` (a dict); refuses by name what is not implemented."""
    refuse_unsupported(hf, {"add_cross_attention": (False, None)})
    for alias, name in ALIASES.items():  # transformers takes whichever it meets last
        if alias in hf and hf[alias] != hf.get(name):
            raise InputError(f"config.json: {alias}={hf[alias]!r} beside {name}={hf.get(name)!r}: make the two agree.")
    vocab_size, width, num_layers, num_heads, max_positions = sizes(
        hf, "vocab_size", "n_embd", "n_layer", "n_head", "n_positions"
    )
    (mlp_width,) = sizes({"n_inner": hf.get("n_inner") or 4 * width}, "n_inner")
    if width % num_heads:
        raise InputError(f"config.json: n_embd={width} is not a multiple of n_head={num_heads}.")
    return Gpt2Config(
        vocab_size, width, num_layers, num_heads, mlp_width, max_positions,
        activation(hf, "activation_function", "gelu_new"), number(hf, "layer_norm_epsilon", 1e-5),
        hf.get("scale_attn_weights", True), hf.get("scale_attn_by_inverse_layer_idx", False),
        hf.get("tie_word_embeddings", True), num_labels,
    )  # fmt: skip


def build(hf, checkpoint, num_labels, dtype):
    """The Gpt2 that config.json `hf` describes."""
    return Gpt2(from_config(hf, num_labels), dtype)


LAYER_MODULES = {
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
GGUF = Gguf({}, LAYER_MODULES, layers="transformer.h", adapters_only=True)
FAMILY = Family({"gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification")}, build, gguf={"gpt2": GGUF})
