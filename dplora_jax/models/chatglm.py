"""ChatGLM-6B (Du et al. 2022; Zeng et al. 2023) with its published weights' names and meaning.

Letters: B rows, T tokens, S tokens that may be attended, D width, H heads.
"""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from dplora_jax.errors import InputError
from dplora_jax.models import chatglm2, chatglm_shared
from dplora_jax.models.chatglm_shared import Chatglm, frequencies
from dplora_jax.models.decoder import OwnHeads, remember
from dplora_jax.models.family import Family, Weight, number, refuse_unsupported, sizes
from dplora_jax.models.layers import ACTIVATIONS, Dense, LayerNorm, attention, rotate_halves, rotation, split_heads

# Residuals grow by sqrt(2 layers), of 28 layers whatever the depth: the published code never tells a block of another.
RESIDUAL_SCALE = (2 * 28) ** 0.5


@dataclasses.dataclass(frozen=True)
class GlmConfig(OwnHeads):
    """Sizes and choices of one ChatGLM-6B; `start_token` ends the prefix that all attend to, and `gmask_token` (or, in a row
    without one, `mask_token`) gives what follows its first position."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    max_positions: int
    start_token: int
    gmask_token: int
    mask_token: int
    norm_eps: float = 1e-5
    tied: bool = False
    num_labels: int | None = None
    remat: bool = False


class GlmBlock(nn.Module):
    """One layer of ChatGLM-6B: the halves of a head turn by one position each, and residuals start from the normalised input."""

    config: GlmConfig

    @nn.compact
    def __call__(self, x, positions_Bx2xT, mask_BxTxS, pairs, state):
        c, pairs = self.config, pairs or {}
        h = LayerNorm(c.norm_eps, name="attention_norm")(x)
        fused = split_heads(Dense(3 * c.width, name="query_key_value")(h, pairs.get("query_key_value")), c.num_heads)
        q, k, v = jnp.split(fused, 3, -1)
        turns = [rotation(positions_Bx2xT[:, axis], frequencies(c.head_width // 4)) for axis in (0, 1)]
        q, k = (
            jnp.concatenate([rotate_halves(x, *turn) for x, turn in zip(jnp.split(y, 2, -1), turns, strict=True)], -1)
            for y in (q, k)
        )
        k, v, state = remember(state, k, v)
        out = attention(q, k, v, mask_BxTxS)
        x = RESIDUAL_SCALE * h + Dense(c.width, name="dense")(out, pairs.get("dense"))
        h = LayerNorm(c.norm_eps, name="mlp_norm")(x)
        inner = ACTIVATIONS["gelu_new"](Dense(c.mlp_width, name="up")(h, pairs.get("up")))
        return RESIDUAL_SCALE * h + Dense(c.width, name="down")(inner, pairs.get("down")), state


@dataclasses.dataclass(frozen=True)
class Glm(Chatglm):
    """ChatGLM-6B as pure functions of its parameters; see Decoder.

    `apply` also takes the reference's own `attention_mask` [B, 1, T, T] bool (True = hidden) and `position_ids` [B, 2, T].
    Without them, a row's prefix ends before its first start token: all of it is seen by all, and what follows is causal. A row
    without a start token is causal from its beginning.
    """

    reads_ids = True

    def last_norm(self):
        """The norm above the last layer."""
        return LayerNorm(self.config.norm_eps)

    def _prefix_length(self, ids):
        start = ids == self.config.start_token
        return jnp.where(start.any(1), jnp.argmax(start, axis=1), 0)[:, None]

    def positions(self, batch, order_BxT):
        """[B, 2, T]: the position (from the start token on, that of the mask token), and the place behind the prefix, from 1."""
        if "position_ids" in batch:
            return batch["position_ids"]
        c, ids = self.config, batch["input_ids"]
        length = self._prefix_length(ids)
        gmask, mask = ids == c.gmask_token, ids == c.mask_token
        hole = jnp.argmax(jnp.where(gmask.any(1, keepdims=True), gmask, mask), axis=1)[:, None]
        # A row with neither start nor mask token keeps its plain positions.
        plain = (order_BxT < length) | ~((gmask | mask).any(1, keepdims=True))
        return jnp.stack([jnp.where(plain, order_BxT, hole), jnp.maximum(order_BxT - length + 1, 0)], axis=1)

    def mask(self, batch, order_q, order_k, valid_k):
        """[B, T, S]: the prefix is seen by all, what follows by what comes after it."""
        given = batch.get("attention_mask")
        if given is not None and given.ndim == 4:
            return ~given[:, 0].astype(bool)
        seen = (order_k[:, None, :] <= order_q[:, :, None]) | (order_k < self._prefix_length(batch["input_ids"]))[
            :, None
        ]
        return seen & valid_k[:, None, :]

    def block(self, layer, x, positions, mask, pairs, state):
        """One layer: x [B, T, D] -> (x, its cache)."""
        return GlmBlock(self.config).apply({"params": layer}, x, positions, mask, pairs, state)

    def init_layer(self, key):
        """Random parameters of one layer."""
        x, ones = jnp.zeros((1, 2, self.config.width)), jnp.ones((1, 2, 2), bool)
        return GlmBlock(self.config).init(key, x, jnp.zeros((1, 2, 2), jnp.int32), ones, None, None)["params"]

    @property
    def targets(self):
        """The matrices that an adapter may name: {target: Target}; q, k and v are one, fused, as in PEFT."""
        d, m, prefix = self.config.width, self.config.mlp_width, "transformer.layers.{}."
        return chatglm_shared.targets(d, 3 * d, d, m, m, prefix + "attention.", prefix)

    def layer_weights(self):
        """The layers' part of the checkpoint's names."""
        modules = {name: target.module for name, target in self.targets.items()}
        return self.named_weights("transformer.layers.{}.", modules, modules, (("norm", "scale"), ("norm", "bias")))

    def outer_weights(self):
        """The rest of the checkpoint's names."""
        return [
            Weight(("embed", "word"), "transformer.word_embeddings", "embedding"),
            *(Weight(("norm", "norm", part), "transformer.final_layernorm", part) for part in ("scale", "bias")),
        ]


def from_config(hf):
    """GlmConfig from `config.json` (a dict); refuses by name what is not implemented."""
    refuse_unsupported(hf, {"position_encoding_2d": (True,)})
    vocab_size, width, num_layers, num_heads, mlp_width, max_positions, start, gmask, mask = sizes(
        hf, "vocab_size", "hidden_size", "num_layers", "num_attention_heads", "inner_hidden_size",
        "max_sequence_length", "bos_token_id", "gmask_token_id", "mask_token_id",
    )  # fmt: skip
    if width % (4 * num_heads):
        raise InputError(f"config.json: hidden_size={width} is not a multiple of 4 num_attention_heads={num_heads}.")
    return GlmConfig(
        vocab_size, width, num_layers, num_heads, mlp_width, max_positions, start, gmask, mask,
        number(hf, "layernorm_epsilon", 1e-5),
    )  # fmt: skip


def build(hf, checkpoint, num_labels, dtype):
    """The Glm or Glm2 that config.json `hf` describes."""
    if num_labels is not None:
        raise InputError("model_type=chatglm has no classifier here: score the words of the labels instead.")
    if chatglm_shared.is_second(hf):
        return chatglm2.Glm2(chatglm2.from_config(hf), dtype)
    # The published code shares the two matrices, and a shared one is saved once.
    config = dataclasses.replace(from_config(hf), tied=not checkpoint.has("lm_head.weight"))
    return Glm(config, dtype)


FAMILY = Family({"chatglm": None}, build)
