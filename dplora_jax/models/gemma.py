"""Gemma 2 (Gemma team 2024) and the text part of Gemma 3 (Gemma team 2025).

Letters: B rows, T tokens, S tokens that may be attended, D width.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn

from dplora_jax.models import llama, rope
from dplora_jax.models.family import Family, Gguf, number, refuse_unsupported, sizes
from dplora_jax.models.layers import RMSNorm
from dplora_jax.models.llama import Llama, LlamaConfig
from dplora_jax.models.rope import GLOBAL, LOCAL

# What transformers takes where config.json does not say: {model_type: options}.
DEFAULTS = {
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
}
SHARED_DEFAULTS = {
    "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096, "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True, "num_key_value_heads": 4,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GemmaConfig(LlamaConfig):
    """Sizes and choices of one Gemma: `query_scale` multiplies attention's scores, `score_cap` bounds them and `logit_cap` the
    logits; Gemma 3 has `head_norms` on queries and keys."""

    query_scale: float = 1.0
    score_cap: float | None = None
    logit_cap: float | None = None
    head_norms: bool = False


class Block(nn.Module):
    """One decoder layer with a norm before and behind each of its parts; see llama.Block. A norm multiplies by 1 + its scale."""

    config: GemmaConfig

    @nn.compact
    def __call__(self, x, turn, mask_BxTxS, pairs, state):
        c, dense = self.config, llama.adapted(pairs)

        def norm(name, y):
            return RMSNorm(c.norm_eps, 1.0, name=name)(y)

        def norms(q, k):
            return (norm("q_norm", q), norm("k_norm", k)) if c.head_norms else (q, k)

        h, how = norm("attention_norm", x), {"scale": c.query_scale, "cap": c.score_cap}
        out, state = llama.attend(c, h, turn, mask_BxTxS, dense, state, norms, **how)
        x = x + norm("attention_end_norm", out)
        return x + norm("mlp_end_norm", llama.feed_forward(c, norm("mlp_norm", x), dense)), state


@dataclasses.dataclass(frozen=True)
class Gemma(Llama):
    """The model as pure functions of its parameters; see Decoder."""

    layer: ClassVar = Block
    outer_norms: ClassVar = {
        "attention_norm": "input_layernorm", "attention_end_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm", "mlp_end_norm": "post_feedforward_layernorm",
    }  # fmt: skip

    @property
    def norms(self):
        """{norm's path in a layer: Hugging Face's name}."""
        heads = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
        return self.outer_norms | (heads if self.config.head_norms else {})

    def embed(self, params, batch):
        """Word embeddings times the root of their width, rounded as they are: `input_ids` [B, T] -> [B, T, D]."""
        word = params["embed"]["word"]
        return jnp.take(word, batch["input_ids"], axis=0) * jnp.asarray(self.config.width**0.5, word.dtype)

    def norm(self, params, x):
        """The norm above the last layer."""
        return RMSNorm(self.config.norm_eps, 1.0).apply({"params": params["norm"]}, x)

    def init_outer(self, key):
        """Random embeddings and the last norm."""
        return super().init_outer(key) | {"norm": {"scale": jnp.zeros(self.config.width)}}


def from_config(hf, num_labels):
    """GemmaConfig from Hugging Face's `config.json` (a dict) of a gemma2 or gemma3_text; refuses by name what is not
    implemented."""
    third = hf["model_type"] == "gemma3_text"
    hf = SHARED_DEFAULTS | DEFAULTS[hf["model_type"]] | hf
    refuse_unsupported(hf, {"use_bidirectional_attention": (False, None), "partial_rotary_factor": (None, 1, 1.0)})
    fields = llama.shared(hf | {"hidden_act": hf["hidden_activation"]})
    layers, width, bias = fields["num_layers"], fields["head_width"], bool(hf.get("attention_bias"))
    (every,) = sizes({"sliding_window_pattern": 6 if third else 2} | hf, "sliding_window_pattern")
    ropes = {"rope": rope.read_kind(hf, width, GLOBAL, hf.get("rope_theta") or 1e6) if third else rope.read(hf, width)}
    if third:
        ropes["local_rope"] = rope.read_kind(hf, width, LOCAL, hf.get("rope_local_base_freq") or 1e4, scaled=False)
    return GemmaConfig(
        **fields, **ropes, **llama.windows(hf, [LOCAL if (i + 1) % every else GLOBAL for i in range(layers)]),
        qkv_bias=bias, output_bias=bias, num_labels=num_labels, head_norms=third,
        query_scale=number(hf, "query_pre_attn_scalar", 256) ** -0.5,
        score_cap=_cap(hf, "attn_logit_softcapping"), logit_cap=_cap(hf, "final_logit_softcapping"),
    )  # fmt: skip


def _cap(hf, name):
    return None if hf[name] is None else number(hf, name, None)


def build(hf, checkpoint, num_labels, dtype):
    """The Gemma that config.json `hf` describes."""
    return Gemma(from_config(hf, num_labels), dtype)


def _document(header, common):
    """No metadata give the scale of queries: llama.cpp knows the 27B models, which alone have their own, by their layers."""
    third = header.architecture() == "gemma3"
    large = common["num_hidden_layers"] == (62 if third else 46)
    caps = {
        key: header.real(key) if not third or f"gemma3.{key}" in header.metadata else None
        for key in ("attn_logit_softcapping", "final_logit_softcapping")
    }
    return common | caps | {
        "model_type": "gemma3_text" if third else "gemma2", "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": common["hidden_size"] // common["num_attention_heads"] if large else common["head_dim"],
    }  # fmt: skip


NORMS = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
GGUF = Gguf(
    llama.MODULES, llama.LAYER_MODULES | NORMS, document=_document, added=1.0,
    reads=("attn_logit_softcapping", "final_logit_softcapping"),
)  # fmt: skip
FAMILY = Family(
    {
        "gemma2": ("Gemma2ForCausalLM", "Gemma2ForSequenceClassification"),
        "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    },
    build,
    gguf={"gemma2": GGUF, "gemma3": GGUF},
    gguf_names={"gemma3_text": "gemma3"},
)
