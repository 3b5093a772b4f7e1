"""Phi-3 (Abdin et al. 2024) and Phi-4: Llama's layers with fused projections, of which a part of each head may turn.

Letters: B rows, T tokens, S tokens that may be attended, D width.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn

from dplora_jax.models import llama, rope
from dplora_jax.models.decoder import remember
from dplora_jax.models.family import Family, Gguf, Target, refuse_unsupported
from dplora_jax.models.layers import ACTIVATIONS, RMSNorm, attention, rotate_halves, split_heads
from dplora_jax.models.llama import Llama, LlamaConfig
from dplora_jax.models.rope import GLOBAL, LOCAL


class Block(nn.Module):
    """One pre-norm decoder layer; see llama.Block."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x, turn, mask_BxTxS, pairs, state):
        c, dense = self.config, llama.adapted(pairs)
        inner, kv = c.num_heads * c.head_width, c.num_kv_heads * c.head_width
        fused = dense("qkv_proj", RMSNorm(c.norm_eps, name="attention_norm")(x), inner + 2 * kv, False)
        q, k, v = jnp.split(fused, (inner, inner + kv), -1)
        q, k, v = split_heads(q, c.num_heads), split_heads(k, c.num_kv_heads), split_heads(v, c.num_kv_heads)
        k, v, state = remember(state, rotate_halves(k, *turn), v)
        x = x + dense("o_proj", attention(rotate_halves(q, *turn), k, v, mask_BxTxS), c.width, False)
        fused = dense("gate_up_proj", RMSNorm(c.norm_eps, name="mlp_norm")(x), 2 * c.mlp_width, False)
        gate, up = jnp.split(fused, 2, -1)
        return x + dense("down_proj", ACTIVATIONS[c.activation](gate) * up, c.width, False), state


@dataclasses.dataclass(frozen=True)
class Phi3(Llama):
    """The model as pure functions of its parameters; see Decoder."""

    layer: ClassVar = Block

    @property
    def targets(self):
        """The matrices that an adapter may name: {target: Target}; what is fused is one, as in PEFT."""
        c, prefix = self.config, "model.layers.{}."
        inner, kv = c.num_heads * c.head_width, c.num_kv_heads * c.head_width
        return {
            name: Target((name, "kernel"), shape, (*aliases, name), f"{prefix}{part}.{name}")
            for name, part, shape, aliases in (
                ("qkv_proj", "self_attn", (c.width, inner + 2 * kv), ("q", "k", "v")),
                ("o_proj", "self_attn", (inner, c.width), ("o",)),
                ("gate_up_proj", "mlp", (c.width, 2 * c.mlp_width), ("gate", "up")),
                ("down_proj", "mlp", (c.mlp_width, c.width), ("down",)),
            )
        }


def from_config(hf, num_labels):
    """LlamaConfig from Hugging Face's `config.json` (a dict); refuses by name what is not implemented."""
    refuse_unsupported(hf, {"attention_bias": (False, None), "mlp_bias": (False, None)})
    fields = llama.shared({"rms_norm_eps": 1e-5} | hf)
    kind = LOCAL if hf.get("sliding_window") is not None else GLOBAL
    return LlamaConfig(
        **fields, **llama.windows(hf, [kind] * fields["num_layers"]), rope=_rope(hf, fields["head_width"]),
        num_labels=num_labels,
    )  # fmt: skip


def _rope(hf, head_width):
    """Its first files call `longrope` su, and wrote yarn in its place."""
    renamed = {}
    for name in ("rope_scaling", "rope_parameters"):
        options = hf.get(name) or {}
        if (options.get("rope_type") or options.get("type")) in ("su", "yarn"):
            renamed[name] = options | {"rope_type": "longrope"}
    return rope.read({"original_max_position_embeddings": 4096} | hf | renamed, head_width, partial=1.0)


def build(hf, checkpoint, num_labels, dtype):
    """The Phi3 that config.json `hf` describes."""
    return Phi3(from_config(hf, num_labels), dtype)


def _document(header, common):
    """What turns of a head, and the length up to which it turns by the short factors."""
    turned = header.size("rope.dimension_count", common["head_dim"])
    length = header.size("rope.scaling.original_context_length", common["max_position_embeddings"])
    return common | {
        "partial_rotary_factor": turned / common["head_dim"], "original_max_position_embeddings": length,
    }  # fmt: skip


LAYER_MODULES = {
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GGUF = Gguf(
    llama.MODULES, LAYER_MODULES, document=_document, reads=("rope.dimension_count", "rope.scaling.attn_factor")
)
FAMILY = Family({"phi3": ("Phi3ForCausalLM", "Phi3ForSequenceClassification")}, build, gguf={"phi3": GGUF})
