"""OLMo 2 (OLMo team 2025) and OLMo 3: Llama's matrices with a norm behind each part of a layer, and norms on queries and keys."""

import dataclasses
from typing import ClassVar

from einops import rearrange
from flax import linen as nn

from dplora_jax.errors import InputError
from dplora_jax.models import llama, rope
from dplora_jax.models.family import Family, Gguf, refuse_unsupported
from dplora_jax.models.layers import RMSNorm, split_heads
from dplora_jax.models.llama import Llama, LlamaConfig
from dplora_jax.models.rope import GLOBAL, LOCAL


class Block(nn.Module):
    """One post-norm decoder layer; see llama.Block."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x, turn, mask_BxTxS, pairs, state):
        c, dense = self.config, llama.adapted(pairs)

        def over_heads(name, y):
            flat = RMSNorm(c.norm_eps, name=name)(rearrange(y, "b t h k -> b t (h k)"))
            return split_heads(flat, y.shape[2])

        def norms(q, k):
            return over_heads("q_norm", q), over_heads("k_norm", k)

        out, state = llama.attend(c, x, turn, mask_BxTxS, dense, state, norms)
        x = x + RMSNorm(c.norm_eps, name="attention_norm")(out)
        return x + RMSNorm(c.norm_eps, name="mlp_norm")(llama.feed_forward(c, x, dense)), state


@dataclasses.dataclass(frozen=True)
class Olmo2(Llama):
    """The model as pure functions of its parameters; see Decoder."""

    layer: ClassVar = Block
    norms: ClassVar = {
        "attention_norm": "post_attention_layernorm", "mlp_norm": "post_feedforward_layernorm",
        "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    }  # fmt: skip


def from_config(hf, num_labels):
    """LlamaConfig from Hugging Face's `config.json` (a dict) of an olmo2 or olmo3; refuses by name what is not implemented."""
    refuse_unsupported(hf, {"partial_rotary_factor": (None, 1, 1.0), "clip_qkv": (None,), "mlp_bias": (False, None)})
    fields = llama.shared({"rms_norm_eps": 1e-5} | hf)
    third, bias = hf["model_type"] == "olmo3", bool(hf.get("attention_bias"))
    layers, width = fields["num_layers"], fields["head_width"]
    if third:
        theta = hf.get("rope_theta") or 500000.0
        ropes = {
            "rope": rope.read_kind(hf, width, GLOBAL, theta),
            "local_rope": rope.read_kind(hf, width, LOCAL, theta, False),
        }
    else:
        ropes = {"rope": rope.read(hf, width)}
    usual = [LOCAL if third and (i + 1) % 4 else GLOBAL for i in range(layers)]
    return LlamaConfig(
        **fields, **ropes, **llama.windows({"sliding_window": 4096} | hf, usual), qkv_bias=bias, output_bias=bias,
        num_labels=num_labels,
    )  # fmt: skip


def build(hf, checkpoint, num_labels, dtype):
    """The Olmo2 that config.json `hf` describes."""
    return Olmo2(from_config(hf, num_labels), dtype)


def _document(header, common):
    """llama.cpp has one name for both; an OLMo 3, whose layers are of two kinds, is read from safetensors."""
    if common["sliding_window"]:
        raise InputError(f"{header.path}: olmo2.attention.sliding_window={common['sliding_window']} is not supported.")
    return common


NORMS = {
    "post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
MATRICES = {theirs: name for theirs, name in llama.LAYER_MODULES.items() if "norm" not in theirs}
FAMILY = Family(
    {
        "olmo2": ("Olmo2ForCausalLM", "Olmo2ForSequenceClassification"),
        "olmo3": ("Olmo3ForCausalLM", "Olmo3ForSequenceClassification"),
    },
    build,
    gguf={"olmo2": Gguf(llama.MODULES, {**MATRICES, **NORMS}, document=_document)},
    gguf_names={"olmo3": "olmo2"},
)
