"""BERT (Devlin et al. 2019): masked language model or classifier, with Hugging Face's weights and meaning.

Letters: B rows, T tokens, D width, V vocabulary.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dplora_jax import lora
from dplora_jax.errors import InputError
from dplora_jax.models import encoder
from dplora_jax.models.encoder import Encoder
from dplora_jax.models.family import Family, Target, Weight, activation, number, refuse_unsupported, sizes
from dplora_jax.models.layers import ACTIVATIONS, Dense, LayerNorm, attention, split_heads


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes and choices of one BERT. `num_labels` None is a masked language model; `pooling` is "pooler" or "mean"."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    max_positions: int
    num_segments: int
    activation: str = "gelu"
    norm_eps: float = 1e-12
    num_labels: int | None = None
    pooling: str = "pooler"
    normalize: bool = False
    remat: bool = False

    @property
    def position_rows(self):
        """Rows of the table of positions."""
        return self.max_positions


class Embed(nn.Module):
    """Word + position + segment embeddings (where there are segments), normalised: ids [B, T] -> [B, T, D]."""

    config: BertConfig

    @nn.compact
    def __call__(self, ids, positions, segments):
        c = self.config

        def look_up(name, rows, index):
            return jnp.take(self.param(name, nn.initializers.normal(0.02), (rows, c.width)), index, axis=0)

        x = look_up("word", c.vocab_size, ids) + look_up("position", c.position_rows, positions)
        if c.num_segments:
            x = x + look_up("segment", c.num_segments, segments)
        return LayerNorm(c.norm_eps, name="norm")(x)


class Block(nn.Module):
    """One post-norm encoder layer; `pairs` {target: lora.Pair} adapts its matrices."""

    config: BertConfig

    @nn.compact
    def __call__(self, x, mask_Bx1xT, pairs=None):
        c, pairs = self.config, pairs or {}
        q, k, v = (
            split_heads(Dense(c.width, name=name)(x, pairs.get(name)), c.num_heads)
            for name in ("query", "key", "value")
        )
        out = Dense(c.width, name="output")(attention(q, k, v, mask_Bx1xT), pairs.get("output"))
        x = LayerNorm(c.norm_eps, name="attention_norm")(x + out)
        h = ACTIVATIONS[c.activation](Dense(c.mlp_width, name="up")(x, pairs.get("up")))
        return LayerNorm(c.norm_eps, name="mlp_norm")(x + Dense(c.width, name="down")(h, pairs.get("down")))


class Transform(nn.Module):
    """The masked language model's last layer before the vocabulary: [B, T, D] -> [B, T, D]."""

    config: BertConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        return LayerNorm(c.norm_eps, name="norm")(ACTIVATIONS[c.activation](Dense(c.width, name="dense")(x)))


@dataclasses.dataclass(frozen=True)
class Bert(Encoder):
    """The model as pure functions of its parameters; see Encoder. What differs in a family of the same layers are names."""

    base: ClassVar = "bert"
    layer: ClassVar = "encoder.layer.{}"
    modules: ClassVar = {
        "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
        "output": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
        "attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm",
    }  # fmt: skip
    embeddings: ClassVar = {"word": "word", "position": "position", "segment": "token_type"}
    pooler_module: ClassVar = "bert.pooler.dense"
    pooler_activation: ClassVar = staticmethod(jnp.tanh)
    transform_modules: ClassVar = {
        "dense": "cls.predictions.transform.dense", "norm": "cls.predictions.transform.LayerNorm",
    }  # fmt: skip
    mlm_bias: ClassVar = "cls.predictions"
    ties: ClassVar = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    carried: ClassVar = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")

    def embed(self, params, batch):
        """Normalised embeddings -> [B, T, D]."""
        ids = batch["input_ids"]
        segments = batch.get("token_type_ids", jnp.zeros_like(ids))
        return Embed(self.config).apply({"params": params["embed"]}, ids, self.positions(batch), segments)

    def positions(self, batch):
        """The rows of the table of positions: [B, T]."""
        ids = batch["input_ids"]
        return batch.get("position_ids", jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape))

    def block(self, layer, x, mask_Bx1xT, pairs):
        """One layer: x [B, T, D] -> [B, T, D]."""
        return Block(self.config).apply({"params": layer}, x, mask_Bx1xT, pairs)

    def pooler(self, params, x, mask_BxT, dense, pair):
        """A dense layer on the first token, float32 [B, D]; `pair` adapts it, `dense` stands for it."""
        if dense is not None:
            return self.pooler_activation(lora.head(x[:, 0], dense))
        pooled = Dense(self.config.width).apply({"params": params["pooler"]}, x[:, :1])
        # Over all tokens, as every adapted matrix: clipping takes their number to be the rows'.
        if pair is not None:
            pooled = pooled + lora.product(x, jax.tree.map(lambda p: p[0], pair))[:, :1]
        return self.pooler_activation(pooled)[:, 0].astype(jnp.float32)

    def transform(self, params, x):
        """What the vocabulary is compared with: [B, T, D] -> [B, T, D]."""
        return Transform(self.config).apply({"params": params["mlm"]["transform"]}, x)

    def init_outer(self, key):
        """Random embeddings."""
        ids = jnp.zeros((1, 2), jnp.int32)
        return {"embed": Embed(self.config).init(key, ids, ids, ids)["params"]}

    def init_layer(self, key):
        """Random parameters of one layer."""
        x, mask = jnp.zeros((1, 2, self.config.width)), jnp.ones((1, 1, 2), bool)
        return Block(self.config).init(key, x, mask)["params"]

    def init_pooler(self, key):
        """Random parameters of the pooler."""
        return Dense(self.config.width).init(key, jnp.zeros((1, 2, self.config.width)))["params"]

    def init_transform(self, key):
        """Random parameters of `transform`."""
        return Transform(self.config).init(key, jnp.zeros((1, 2, self.config.width)))["params"]

    @property
    def targets(self):
        """The matrices that an adapter may name: {target: Target}."""
        d, m, prefix = self.config.width, self.config.mlp_width, f"{self.base}.{self.layer}."
        names = {name: (name[0], name) for name in ("query", "key", "value")}
        names |= {"output": ("o", "output"), "up": ("up", "intermediate"), "down": ("down",)}
        shapes = {"up": (d, m), "down": (m, d)}
        theirs = {name: self.modules[name].split(".")[-1] for name in names}
        targets = {
            name: Target(
                (name, "kernel"), shapes.get(name, (d, d)),
                aliases if theirs[name] in (*aliases, "dense") else (*aliases, theirs[name]), prefix + self.modules[name],
            )
            for name, aliases in names.items()
        }  # fmt: skip
        # What PEFT trains whole, it does not adapt.
        if self.head_dense is None and self.config.num_labels is not None and self.config.pooling == "pooler":
            targets["pooler"] = Target(("pooler", "kernel"), (d, d), ("pooler",), self.pooler_module)
        return targets

    def body_weights(self):
        """The bare model's part of the checkpoint's names."""
        table, layer = [], f"{self.base}.{self.layer}."
        for ours, theirs in self.modules.items():
            inner, parts = (("norm",), ("scale", "bias")) if "norm" in ours else ((), ("kernel", "bias"))
            table += [Weight(("layers", ours, *inner, part), layer + theirs, part) for part in parts]
        table += [
            Weight(("embed", ours), f"{self.base}.embeddings.{theirs}_embeddings", "embedding")
            for ours, theirs in self.embeddings.items()
        ]
        norm = f"{self.base}.embeddings.LayerNorm"
        return table + [Weight(("embed", "norm", "norm", part), norm, part) for part in ("scale", "bias")]

    def pooler_weights(self):
        """The pooler's."""
        return [Weight((self.pooler_key, part), self.pooler_module, part) for part in ("kernel", "bias")]

    def transform_weights(self):
        """Those of `transform`."""
        paths = {"dense": (("kernel",), ("bias",)), "norm": (("norm", "scale"), ("norm", "bias"))}
        return [
            Weight(("mlm", "transform", ours, *path), theirs, path[-1])
            for ours, theirs in self.transform_modules.items()
            for path in paths[ours]
        ]


def from_config(hf, num_labels, pooling, normalize):
    """BertConfig from Hugging Face's `config.json` (a dict); refuses by name what is not implemented."""
    refuse_unsupported(
        hf,
        {
            "position_embedding_type": (None, "absolute"),
            "is_decoder": (False, None),
            "add_cross_attention": (False, None),
            "tie_word_embeddings": (True,),
        },
    )
    vocab_size, width, num_layers, num_heads, mlp_width, max_positions, num_segments = sizes(
        hf, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "max_position_embeddings", "type_vocab_size",
    )  # fmt: skip
    if width % num_heads:
        raise InputError(f"config.json: hidden_size={width} is not a multiple of num_attention_heads={num_heads}.")
    return BertConfig(
        vocab_size, width, num_layers, num_heads, mlp_width, max_positions, num_segments,
        activation(hf, "hidden_act", "gelu"), number(hf, "layer_norm_eps", 1e-12), num_labels, pooling, normalize,
    )  # fmt: skip


def build(hf, checkpoint, num_labels, dtype):
    """The Bert that config.json `hf` describes."""
    how = encoder.pooling(hf, checkpoint, Bert.pooler_module, Bert.head_module)
    return Bert(from_config(hf, num_labels, *how), dtype)


FAMILY = Family(
    {"bert": ("BertForMaskedLM", "BertForSequenceClassification")},
    build,
    bare={"bert": "BertModel"},
    bidirectional=True,
)
