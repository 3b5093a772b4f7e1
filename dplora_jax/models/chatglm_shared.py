"""What both generations of ChatGLM share: one fused projection, the names of their layers, the frequencies of half a head."""

import jax
import jax.numpy as jnp

from dplora_jax.models.decoder import Decoder
from dplora_jax.models.family import Target, Weight, refuse_unsupported


def frequencies(count):
    """`count` rotary frequencies from 1 down, in radians a position."""
    return tuple(10000.0 ** (-i / count) for i in range(count))


class Chatglm(Decoder):
    """What both generations share; each gives `last_norm`, the norm above its last layer."""

    carried = ("transformer.rotary_pos_emb.inv_freq", "transformer.layers.{}.attention.rotary_emb.inv_freq")

    def embed(self, params, batch):
        """Word embeddings: `input_ids` [B, T] -> [B, T, D]."""
        return jnp.take(params["embed"]["word"], batch["input_ids"], axis=0)

    def init_outer(self, key):
        """Random embeddings and the last norm."""
        c = self.config
        norm = self.last_norm().init(key, jnp.zeros((1, c.width)))["params"]
        return {"embed": {"word": 0.02 * jax.random.normal(key, (c.vocab_size, c.width))}, "norm": norm}

    def norm(self, params, x):
        """The norm above the last layer."""
        return self.last_norm().apply({"params": params["norm"]}, x)

    def named_weights(self, prefix, modules, biased, norm_parts):
        """The layers' part of the checkpoint's names, `modules` being the name of each target's own."""
        table = [Weight(("layers", name, "kernel"), module, "kernel") for name, module in modules.items()]
        table += [Weight(("layers", name, "bias"), modules[name], "bias") for name in biased]
        norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        return table + [
            Weight(("layers", ours, *path), prefix + name, path[-1])
            for ours, name in norms.items()
            for path in norm_parts
        ]


def targets(width, fused, inner, up, down, attention_prefix, prefix):
    """Both generations' matrices: {target: Target}."""
    return {
        "query_key_value": Target(
            ("query_key_value", "kernel"), (width, fused), ("q", "k", "v", "query_key_value"),
            attention_prefix + "query_key_value",
        ),
        "dense": Target(("dense", "kernel"), (inner, width), ("o", "dense"), attention_prefix + "dense"),
        "up": Target(("up", "kernel"), (width, up), ("up", "dense_h_to_4h"), prefix + "mlp.dense_h_to_4h"),
        "down": Target(("down", "kernel"), (down, width), ("down", "dense_4h_to_h"), prefix + "mlp.dense_4h_to_h"),
    }  # fmt: skip


def is_second(hf):
    """Whether config.json `hf` (a dict) is of ChatGLM2 or 3, not of ChatGLM-6B: both say `model_type: chatglm`.

    Raises InputError on options of either that are not implemented.
    """
    refuse_unsupported(hf, {"quantization_bit": (0, None), "pre_seq_len": (None,), "prefix_projection": (False, None)})
    return "padded_vocab_size" in hf or "ffn_hidden_size" in hf
