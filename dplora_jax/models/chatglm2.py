"""ChatGLM2 and ChatGLM3 (Zeng et al. 2023; GLM team 2024) with their published weights' names and meaning.

Letters: B rows, T tokens, S tokens that may be attended, D width, H query heads, G key and value heads, K head width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from dplora_jax.errors import InputError
from dplora_jax.models import chatglm_shared
from dplora_jax.models.chatglm_shared import Chatglm, frequencies
from dplora_jax.models.decoder import remember
from dplora_jax.models.family import Weight, number, refuse_unsupported, sizes
from dplora_jax.models.layers import Dense, RMSNorm, attention, rotate_pairs, rotation, split_heads


@dataclasses.dataclass(frozen=True)
class Glm2Config:
    """Sizes and choices of one ChatGLM2 or ChatGLM3."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    max_positions: int
    norm_eps: float = 1e-5
    qkv_bias: bool = True
    tied: bool = False
    num_labels: int | None = None
    remat: bool = False


class Glm2Block(nn.Module):
    """One layer of ChatGLM2: the first half of each head turns, in pairs; keys and values are shared by groups of heads."""

    config: Glm2Config

    @nn.compact
    def __call__(self, x, positions_BxT, mask_BxTxS, pairs, state):
        c, pairs = self.config, pairs or {}
        inner, kv = c.num_heads * c.head_width, c.num_kv_heads * c.head_width
        h = RMSNorm(c.norm_eps, name="attention_norm")(x)
        fused = Dense(inner + 2 * kv, c.qkv_bias, name="query_key_value")(h, pairs.get("query_key_value"))
        q, k, v = jnp.split(fused, (inner, inner + kv), -1)
        q, k, v = split_heads(q, c.num_heads), split_heads(k, c.num_kv_heads), split_heads(v, c.num_kv_heads)
        turn = rotation(positions_BxT, frequencies(c.head_width // 4))
        half = c.head_width // 2
        q, k = (jnp.concatenate([rotate_pairs(y[..., :half], *turn), y[..., half:]], -1) for y in (q, k))
        k, v, state = remember(state, k, v)
        x = x + Dense(c.width, False, name="dense")(attention(q, k, v, mask_BxTxS), pairs.get("dense"))
        h = RMSNorm(c.norm_eps, name="mlp_norm")(x)
        gate, up = jnp.split(Dense(2 * c.mlp_width, False, name="up")(h, pairs.get("up")), 2, -1)
        return x + Dense(c.width, False, name="down")(jax.nn.silu(gate) * up, pairs.get("down")), state


@dataclasses.dataclass(frozen=True)
class Glm2(Chatglm):
    """ChatGLM2 or ChatGLM3 as pure functions of its parameters; see Decoder."""

    tied_name = "transformer.output_layer"

    def last_norm(self):
        """The norm above the last layer."""
        return RMSNorm(self.config.norm_eps)

    def block(self, layer, x, positions, mask, pairs, state):
        """One layer: x [B, T, D] -> (x, its cache)."""
        return Glm2Block(self.config).apply({"params": layer}, x, positions, mask, pairs, state)

    def init_layer(self, key):
        """Random parameters of one layer."""
        x, ones = jnp.zeros((1, 2, self.config.width)), jnp.ones((1, 2, 2), bool)
        return Glm2Block(self.config).init(key, x, jnp.zeros((1, 2), jnp.int32), ones, None, None)["params"]

    @property
    def targets(self):
        """The matrices that an adapter may name: {target: Target}; q, k and v are one, fused, as in PEFT."""
        c, prefix = self.config, "transformer.encoder.layers.{}."
        inner, kv = c.num_heads * c.head_width, c.num_kv_heads * c.head_width
        return chatglm_shared.targets(
            c.width, inner + 2 * kv, inner, 2 * c.mlp_width, c.mlp_width, prefix + "self_attention.", prefix
        )

    def layer_weights(self):
        """The layers' part of the checkpoint's names."""
        modules = {name: target.module for name, target in self.targets.items()}
        biased = ("query_key_value",) if self.config.qkv_bias else ()
        return self.named_weights("transformer.encoder.layers.{}.", modules, biased, (("scale",),))

    def outer_weights(self):
        """The rest of the checkpoint's names."""
        return [
            Weight(("embed", "word"), "transformer.embedding.word_embeddings", "embedding"),
            Weight(("norm", "scale"), "transformer.encoder.final_layernorm", "scale"),
        ]


def from_config(hf):
    """Glm2Config from `config.json` (a dict); refuses by name what is not implemented."""
    refuse_unsupported(
        hf,
        {
            "rmsnorm": (True,), "post_layer_norm": (True,), "add_bias_linear": (False,), "rope_ratio": (1, 1.0, None),
            "apply_residual_connection_post_layernorm": (False,), "fp32_residual_connection": (False,),
            "original_rope": (True,), "interleaved_qkv": (False,), "tie_word_embeddings": (False,),
        },
    )  # fmt: skip
    vocab_size, width, num_layers, num_heads, head_width, mlp_width, max_positions = sizes(
        hf, "padded_vocab_size", "hidden_size", "num_layers", "num_attention_heads", "kv_channels", "ffn_hidden_size",
        "seq_length",
    )  # fmt: skip
    grouped = hf.get("multi_query_attention", False)
    groups = {"multi_query_group_num": hf.get("multi_query_group_num", 1) if grouped else num_heads}
    (num_kv_heads,) = sizes(groups, "multi_query_group_num")
    if num_heads % num_kv_heads or head_width % 4:
        raise InputError(
            f"config.json: num_attention_heads={num_heads} does not divide by multi_query_group_num={num_kv_heads}, "
            f"or kv_channels={head_width} by 4."
        )
    return Glm2Config(
        vocab_size, width, num_layers, num_heads, num_kv_heads, head_width, mlp_width, max_positions,
        number(hf, "layernorm_epsilon", 1e-5), hf.get("add_qkv_bias", False),
    )  # fmt: skip
