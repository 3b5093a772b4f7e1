"""GPT-NeoX (Black et al. 2022), and with it Pythia (Biderman et al. 2023): parallel parts of a layer, a part of each head turns.

Letters: B rows, T tokens, S tokens that may be attended, D width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dplora_jax.errors import InputError
from dplora_jax.models import rope
from dplora_jax.models.decoder import Decoder, OwnHeads, remember
from dplora_jax.models.family import Family, Gguf, Target, Weight, activation, number, sizes
from dplora_jax.models.layers import ACTIVATIONS, Dense, LayerNorm, attention, rotate_halves, split_heads
from dplora_jax.models.rope import Rope


@dataclasses.dataclass(frozen=True)
class NeoxConfig(OwnHeads):
    """Sizes and choices of one GPT-NeoX; with `parallel`, both parts of a layer read the same input."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    max_positions: int
    rope: Rope
    activation: str = "gelu"
    norm_eps: float = 1e-5
    parallel: bool = True
    attention_bias: bool = True
    tied: bool = False
    num_labels: int | None = None
    remat: bool = False


class Block(nn.Module):
    """One pre-norm decoder layer; `pairs` {target: lora.Pair} adapts its matrices, `state` is its cache or None."""

    config: NeoxConfig

    @nn.compact
    def __call__(self, x, turn, mask_BxTxS, pairs, state):
        c, pairs = self.config, pairs or {}

        def dense(name, y, features, bias=True):
            return Dense(features, bias, name=name)(y, pairs.get(name))

        h = LayerNorm(c.norm_eps, name="attention_norm")(x)
        fused = split_heads(dense("query_key_value", h, 3 * c.width, c.attention_bias), c.num_heads)
        q, k, v = jnp.split(fused, 3, -1)
        k, v, state = remember(state, rotate_halves(k, *turn), v)
        out = attention(rotate_halves(q, *turn), k, v, mask_BxTxS)
        attended = x + dense("dense", out, c.width, c.attention_bias)
        h = LayerNorm(c.norm_eps, name="mlp_norm")(x if c.parallel else attended)
        return attended + dense("down", ACTIVATIONS[c.activation](dense("up", h, c.mlp_width)), c.width), state


@dataclasses.dataclass(frozen=True)
class Neox(Decoder):
    """The model as pure functions of its parameters; see Decoder."""

    tied_name = "embed_out"
    idle = r"embed_out\.weight|.*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"

    def embed(self, params, batch):
        """Word embeddings: `input_ids` [B, T] -> [B, T, D]."""
        return jnp.take(params["embed"]["word"], batch["input_ids"], axis=0)

    def block(self, layer, x, positions, mask, pairs, state):
        """One layer: x [B, T, D] -> (x, its cache)."""
        turn = self.config.rope.turn(positions, mask.shape[-1])
        return Block(self.config).apply({"params": layer}, x, turn, mask, pairs, state)

    def norm(self, params, x):
        """The norm above the last layer."""
        return LayerNorm(self.config.norm_eps).apply({"params": params["norm"]}, x)

    def init_layer(self, key):
        """Random parameters of one layer."""
        x, turn = jnp.zeros((1, 2, self.config.width)), self.config.rope.turn(jnp.zeros((1, 2), jnp.int32), 2)
        return Block(self.config).init(key, x, turn, jnp.ones((1, 2, 2), bool), None, None)["params"]

    def init_outer(self, key):
        """Random embeddings and the last norm."""
        c = self.config
        norm = LayerNorm(c.norm_eps).init(key, jnp.zeros((1, c.width)))["params"]
        return {"embed": {"word": 0.02 * jax.random.normal(key, (c.vocab_size, c.width))}, "norm": norm}

    @property
    def targets(self):
        """The matrices that an adapter may name: {target: Target}; q, k and v are one, fused, as in PEFT."""
        d, m, prefix = self.config.width, self.config.mlp_width, "gpt_neox.layers.{}."
        return {
            name: Target((name, "kernel"), shape, aliases, prefix + module)
            for name, shape, aliases, module in (
                ("query_key_value", (d, 3 * d), ("q", "k", "v", "query_key_value"), "attention.query_key_value"),
                ("dense", (d, d), ("o", "dense"), "attention.dense"),
                ("up", (d, m), ("up", "dense_h_to_4h"), "mlp.dense_h_to_4h"),
                ("down", (m, d), ("down", "dense_4h_to_h"), "mlp.dense_4h_to_h"),
            )
        }

    def layer_weights(self):
        """The layers' part of the checkpoint's names."""
        unbiased = () if self.config.attention_bias else ("query_key_value", "dense")
        table = [
            Weight(("layers", name, part), target.module, part)
            for name, target in self.targets.items()
            for part in ("kernel", "bias")
            if part == "kernel" or name not in unbiased
        ]
        norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        return table + [
            Weight(("layers", ours, "norm", part), f"gpt_neox.layers.{{}}.{name}", part)
            for ours, name in norms.items()
            for part in ("scale", "bias")
        ]

    def outer_weights(self):
        """The rest of the checkpoint's names."""
        norm = "gpt_neox.final_layer_norm"
        return [
            Weight(("embed", "word"), "gpt_neox.embed_in", "embedding"),
            *(Weight(("norm", "norm", part), norm, part) for part in ("scale", "bias")),
        ]


def from_config(hf, num_labels):
    """NeoxConfig from Hugging Face's `config.json` (a dict); refuses by name what is not implemented."""
    vocab_size, width, num_layers, num_heads, mlp_width, max_positions = sizes(
        hf, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "max_position_embeddings",
    )  # fmt: skip
    if width % num_heads:
        raise InputError(f"config.json: hidden_size={width} is not a multiple of num_attention_heads={num_heads}.")
    old = {"rope_theta": hf.get("rotary_emb_base"), "partial_rotary_factor": hf.get("rotary_pct")}
    return NeoxConfig(
        vocab_size, width, num_layers, num_heads, mlp_width, max_positions,
        rope.read({name: value for name, value in old.items() if value is not None} | hf, width // num_heads, partial=0.25),
        activation(hf, "hidden_act", "gelu"), number(hf, "layer_norm_eps", 1e-5),
        bool(hf.get("use_parallel_residual", True)), bool(hf.get("attention_bias", True)),
        bool(hf.get("tie_word_embeddings")), num_labels,
    )  # fmt: skip


def build(hf, checkpoint, num_labels, dtype):
    """The Neox that config.json `hf` describes."""
    return Neox(from_config(hf, num_labels), dtype)


def _parts(name, rows, heads, kv_heads):
    """Where llama.cpp keeps the rows of the fused matrix: all heads' q, then k, then v; here they lie head by head."""
    if not name.endswith("query_key_value.weight"):
        return None
    head, part, inside = np.unravel_index(np.arange(rows), (heads, 3, rows // (3 * heads)))
    return np.ravel_multi_index((part, head, inside), (3, heads, rows // (3 * heads)))


LAYER_MODULES = {
    "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down",
}  # fmt: skip
FAMILY = Family(
    {"gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXForSequenceClassification")},
    build,
    gguf={"gptneox": Gguf({}, LAYER_MODULES, layers="gpt_neox.layers", order=_parts, adapters_only=True)},
    gguf_names={"gpt_neox": "gptneox"},
)
