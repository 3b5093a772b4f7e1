"""Qwen3 (Yang et al. 2025): Llama's layers with a norm on every head's query and key."""

import dataclasses
from typing import ClassVar

from flax import linen as nn

from dplora_jax.models import llama, rope
from dplora_jax.models.family import Family, refuse_unsupported
from dplora_jax.models.layers import RMSNorm
from dplora_jax.models.llama import Llama, LlamaConfig


class Block(nn.Module):
    """One pre-norm decoder layer; see llama.Block."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x, turn, mask_BxTxS, pairs, state):
        c, dense = self.config, llama.adapted(pairs)

        def norms(q, k):
            return RMSNorm(c.norm_eps, name="q_norm")(q), RMSNorm(c.norm_eps, name="k_norm")(k)

        h = RMSNorm(c.norm_eps, name="attention_norm")(x)
        out, state = llama.attend(c, h, turn, mask_BxTxS, dense, state, norms)
        x = x + out
        return x + llama.feed_forward(c, RMSNorm(c.norm_eps, name="mlp_norm")(x), dense), state


@dataclasses.dataclass(frozen=True)
class Qwen3(Llama):
    """The model as pure functions of its parameters; see Decoder."""

    layer: ClassVar = Block
    norms: ClassVar = Llama.norms | {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


def from_config(hf, num_labels):
    """LlamaConfig from Hugging Face's `config.json` (a dict); refuses by name what is not implemented."""
    refuse_unsupported(hf, {"partial_rotary_factor": (None, 1, 1.0), "mlp_bias": (False, None)})
    fields, bias = llama.shared({"head_dim": 128} | hf), bool(hf.get("attention_bias"))
    return LlamaConfig(
        **fields, **llama.qwen_windows(hf, fields["num_layers"]), rope=rope.read(hf, fields["head_width"]),
        qkv_bias=bias, output_bias=bias, num_labels=num_labels,
    )  # fmt: skip


def build(hf, checkpoint, num_labels, dtype):
    """The Qwen3 that config.json `hf` describes."""
    return Qwen3(from_config(hf, num_labels), dtype)


NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
FAMILY = Family(
    {"qwen3": ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification")},
    build,
    gguf={"qwen3": dataclasses.replace(llama.GGUF, layer_modules=llama.LAYER_MODULES | NORMS)},
)
