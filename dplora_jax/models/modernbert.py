"""ModernBERT (Warner et al. 2024): a pre-norm encoder with rotary positions, GeGLU, and windows in two of three layers.

Letters: B rows, T tokens, D width. A row's padding is masked; nothing is unpadded across rows.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dplora_jax import lora
from dplora_jax.errors import InputError
from dplora_jax.models import encoder, rope
from dplora_jax.models.encoder import Encoder
from dplora_jax.models.family import Family, Target, Weight, activation, number, refuse_unsupported, sizes
from dplora_jax.models.layers import ACTIVATIONS, Dense, LayerNorm, attention, rotate_halves, split_heads
from dplora_jax.models.rope import GLOBAL, LOCAL, Rope


@dataclasses.dataclass(frozen=True)
class ModernBertConfig:
    """Sizes and choices of one ModernBERT. In the layers that `local` marks, a token attends to those at most `reach` away, and
    turns by `local_rope`. `pooling` is "pooler", of the first token or (`averaged`) of the mean, or "mean" alone."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    max_positions: int
    reach: int
    local: tuple[bool, ...]
    rope: Rope
    local_rope: Rope
    activation: str = "gelu"
    head_activation: str = "gelu"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    averaged: bool = False
    num_labels: int | None = None
    pooling: str = "pooler"
    normalize: bool = False
    remat: bool = False


class Embed(nn.Module):
    """Word embeddings, normalised: ids [B, T] -> [B, T, D]."""

    config: ModernBertConfig

    @nn.compact
    def __call__(self, ids):
        c = self.config
        word = self.param("word", nn.initializers.normal(0.02), (c.vocab_size, c.width))
        return LayerNorm(c.norm_eps, c.norm_bias, name="norm")(jnp.take(word, ids, axis=0))


class Block(nn.Module):
    """One pre-norm layer, the first without its first norm; `pairs` {target: lora.Pair} adapts its matrices."""

    config: ModernBertConfig

    @nn.compact
    def __call__(self, x, first, turn, mask_BxTxT, pairs):
        c, pairs = self.config, pairs or {}

        def dense(name, y, features, bias):
            return Dense(features, bias, name=name)(y, pairs.get(name))

        h = jnp.where(first, x, LayerNorm(c.norm_eps, c.norm_bias, name="attention_norm")(x))
        fused = dense("Wqkv", h, 3 * c.width, c.attention_bias)
        q, k, v = (split_heads(part, c.num_heads) for part in jnp.split(fused, 3, -1))
        out = attention(rotate_halves(q, *turn), rotate_halves(k, *turn), v, mask_BxTxT)
        x = x + dense("output", out, c.width, c.attention_bias)
        h = LayerNorm(c.norm_eps, c.norm_bias, name="mlp_norm")(x)
        gate, up = jnp.split(dense("up", h, 2 * c.mlp_width, c.mlp_bias), 2, -1)
        return x + dense("down", ACTIVATIONS[c.activation](gate) * up, c.width, c.mlp_bias)


@dataclasses.dataclass(frozen=True)
class ModernBert(Encoder):
    """The model as pure functions of its parameters; see Encoder."""

    base: ClassVar = "model"
    mlm_bias: ClassVar = "decoder"
    ties: ClassVar = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}
    idle: ClassVar = r"(decoder|head)\..+"
    modules: ClassVar = {"Wqkv": "attn.Wqkv", "output": "attn.Wo", "up": "mlp.Wi", "down": "mlp.Wo"}

    def init(self, key):
        """Random parameters (normal 0.02, zero biases) in the layout of `apply`; for tests and shapes."""
        params = super().init(key)
        norm = jax.tree.map(lambda p: p[1:], params["layers"]["attention_norm"])
        return params | {"layers": params["layers"] | {"attention_norm": norm}}

    def embed(self, params, batch):
        """Normalised embeddings -> [B, T, D]."""
        return Embed(self.config).apply({"params": params["embed"]}, batch["input_ids"])

    def masks(self, mask_BxT):
        """Which tokens may be attended [B, 1, T], and which of them from within reach [B, T, T]."""
        places = jnp.arange(mask_BxT.shape[1])
        near = jnp.abs(places[:, None] - places) <= self.config.reach
        return mask_BxT[:, None], mask_BxT[:, None] & near

    def stack(self, params):
        """The layers' parameters, which is the first (whose first norm is there for the shape alone), and which have a window."""
        local = jnp.asarray(self.config.local)
        norm = jax.tree.map(
            lambda p: jnp.concatenate([jnp.ones_like(p, shape=(1, *p.shape[1:])), p]),
            params["layers"]["attention_norm"],
        )
        layers = params["layers"] | {"attention_norm": norm}
        return {"params": layers, "first": jnp.arange(len(local)) == 0, "local": local}

    def block(self, layer, x, masks, pairs):
        """One layer: x [B, T, D] -> [B, T, D]."""
        c, local = self.config, layer["local"]
        places = jnp.arange(x.shape[1])[None]
        ropes = zip(c.local_rope.turn(places, x.shape[1]), c.rope.turn(places, x.shape[1]), strict=True)
        turn, mask = [jnp.where(local, *pair) for pair in ropes], jnp.where(local, masks[1], masks[0])
        return Block(c).apply({"params": layer["params"]}, x, layer["first"], turn, mask, pairs)

    def final(self, params, x):
        """The norm above the last layer."""
        return LayerNorm(self.config.norm_eps, self.config.norm_bias).apply({"params": params["norm"]}, x)

    def pooler(self, params, x, mask_BxT, dense, pair):
        """A dense layer and a norm on the first token or the mean, float32 [B, D]; `pair` adapts the dense layer."""
        c, x = self.config, self.final(params, x)

        def pooled(y):
            return encoder.mean(y, mask_BxT)[:, None].astype(y.dtype) if c.averaged else y[:, :1]

        # Over all tokens, as every adapted matrix: clipping takes their number to be the rows'.
        more = None if pair is None else pooled(lora.product(x, jax.tree.map(lambda p: p[0], pair)))
        return self._head(params["pooler"], pooled(x), more)[:, 0].astype(jnp.float32)

    def transform(self, params, x):
        """What the vocabulary is compared with: [B, T, D] -> [B, T, D]."""
        return self._head(params["mlm"]["transform"], self.final(params, x))

    def _head(self, params, x, more=None):
        """The dense layer, of which `more` is an adapter's part, its activation and its norm."""
        c = self.config
        h = Dense(c.width, c.head_bias).apply({"params": params["dense"]}, x)
        h = ACTIVATIONS[c.head_activation](h if more is None else h + more)
        return LayerNorm(c.norm_eps, c.norm_bias).apply({"params": params["norm"]}, h)

    def init_outer(self, key):
        """Random embeddings and the last norm."""
        embed = Embed(self.config).init(key, jnp.zeros((1, 2), jnp.int32))["params"]
        return {"embed": embed, "norm": self._init_norm(key)}

    def init_layer(self, key):
        """Random parameters of one layer."""
        x, turn = jnp.zeros((1, 2, self.config.width)), self.config.rope.turn(jnp.zeros((1, 2), jnp.int32), 2)
        return Block(self.config).init(key, x, False, turn, jnp.ones((1, 2, 2), bool), None)["params"]

    def init_pooler(self, key):
        """Random parameters of the dense layer and the norm below a head."""
        dense = Dense(self.config.width, self.config.head_bias).init(key, jnp.zeros((1, 2, self.config.width)))[
            "params"
        ]
        return {"dense": dense, "norm": self._init_norm(key)}

    init_transform = init_pooler

    def _init_norm(self, key):
        norm = LayerNorm(self.config.norm_eps, self.config.norm_bias)
        return norm.init(key, jnp.zeros((1, self.config.width)))["params"]

    @property
    def targets(self):
        """The matrices that an adapter may name: {target: Target}; q, k and v are one, fused, as in PEFT."""
        c, prefix = self.config, "model.layers.{}."
        shapes = {"Wqkv": (c.width, 3 * c.width), "output": (c.width, c.width)}
        shapes |= {"up": (c.width, 2 * c.mlp_width), "down": (c.mlp_width, c.width)}
        aliases = {"Wqkv": ("q", "k", "v", "Wqkv"), "output": ("o", "output"), "up": ("up", "Wi"), "down": ("down",)}
        targets = {
            name: Target((name, "kernel"), shapes[name], aliases[name], prefix + module)
            for name, module in self.modules.items()
        }
        if c.num_labels is not None and c.pooling == "pooler":
            targets["pooler"] = Target(("pooler", "dense", "kernel"), (c.width, c.width), ("pooler",), "head.dense")
        return targets

    def body_weights(self):
        """The bare model's part of the checkpoint's names."""
        c, layer = self.config, "model.layers.{}."
        biased = {"Wqkv": c.attention_bias, "output": c.attention_bias, "up": c.mlp_bias, "down": c.mlp_bias}
        table = [
            Weight(("layers", ours, part), layer + theirs, part)
            for ours, theirs in self.modules.items()
            for part in (("kernel", "bias") if biased[ours] else ("kernel",))
        ]
        return [
            *table,
            *self._norm(("layers", "attention_norm"), layer + "attn_norm", first=1),
            *self._norm(("layers", "mlp_norm"), layer + "mlp_norm"),
            Weight(("embed", "word"), "model.embeddings.tok_embeddings", "embedding"),
            *self._norm(("embed", "norm"), "model.embeddings.norm"),
            *self._norm(("norm",), "model.final_norm"),
        ]

    def _norm(self, path, name, first=0):
        parts = ("scale", "bias") if self.config.norm_bias else ("scale",)
        return [Weight((*path, "norm", part), name, part, first=first) for part in parts]

    def _head_weights(self, *path):
        parts = ("kernel", "bias") if self.config.head_bias else ("kernel",)
        dense = [Weight((*path, "dense", part), "head.dense", part) for part in parts]
        return dense + self._norm((*path, "norm"), "head.norm")

    def pooler_weights(self):
        """The pooler's."""
        return self._head_weights("pooler")

    def transform_weights(self):
        """Those of `transform`."""
        return self._head_weights("mlm", "transform")


def from_config(hf, num_labels, pooling, normalize):
    """ModernBertConfig from Hugging Face's `config.json` (a dict); refuses by name what is not implemented."""
    refuse_unsupported(
        hf, {"tie_word_embeddings": (True,), "decoder_bias": (True,), "classifier_pooling": ("cls", "mean")}
    )
    vocab_size, width, num_layers, num_heads, mlp_width, max_positions = sizes(
        hf, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "max_position_embeddings",
    )  # fmt: skip
    if width % num_heads or width // num_heads % 2:
        raise InputError(
            f"config.json: hidden_size={width} makes no even heads, num_attention_heads={num_heads} of them."
        )
    every, reach = sizes(
        {"global_attn_every_n_layers": 3, "local_attention": 128} | hf, "global_attn_every_n_layers", "local_attention"
    )
    kinds = hf.get("layer_types") or [LOCAL if i % every else GLOBAL for i in range(num_layers)]
    if len(kinds) != num_layers or not set(kinds) <= {GLOBAL, LOCAL}:
        raise InputError(
            f"config.json: layer_types={kinds!r} must be {GLOBAL} or {LOCAL} for each of {num_layers} layers."
        )
    thetas = {GLOBAL: hf.get("global_rope_theta") or 160000.0, LOCAL: hf.get("local_rope_theta") or 10000.0}
    ropes = (rope.read_kind(hf, width // num_heads, kind, theta) for kind, theta in thetas.items())
    return ModernBertConfig(
        vocab_size, width, num_layers, num_heads, mlp_width, max_positions, reach // 2,
        tuple(kind == LOCAL for kind in kinds), *ropes, activation(hf, "hidden_activation", "gelu"),
        activation(hf, "classifier_activation", "gelu"), number(hf, "norm_eps", 1e-5),
        *(bool(hf.get(name)) for name in ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")),
        hf.get("classifier_pooling") == "mean", num_labels, pooling, normalize,
    )  # fmt: skip


def build(hf, checkpoint, num_labels, dtype):
    """The ModernBert that config.json `hf` describes."""
    how = encoder.pooling(hf, checkpoint, "head.dense", ModernBert.head_module)
    return ModernBert(from_config(hf, num_labels, *how), dtype)


FAMILY = Family(
    {"modernbert": ("ModernBertForMaskedLM", "ModernBertForSequenceClassification")},
    build,
    bare={"modernbert": "ModernBertModel"},
    bidirectional=True,
)
