"""BERT (Devlin et al. 2019): masked language model or classifier, with Hugging Face's weights and meaning.

Letters: B rows, T tokens, D width, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from dplora_jax import lora
from dplora_jax.errors import InputError
from dplora_jax.models import features
from dplora_jax.models.family import Target, Weight, activation, number, refuse_unsupported, sizes
from dplora_jax.models.layers import ACTIVATIONS, Dense, LayerNorm, attended, attention, run_layers, split_heads


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


class Embed(nn.Module):
    """Word + position + segment embeddings, normalised: ids [B, T] -> [B, T, D]."""

    config: BertConfig

    @nn.compact
    def __call__(self, ids, positions, segments):
        c = self.config

        def look_up(name, rows, index):
            return jnp.take(self.param(name, nn.initializers.normal(0.02), (rows, c.width)), index, axis=0)

        x = look_up("word", c.vocab_size, ids) + look_up("position", c.max_positions, positions)
        return LayerNorm(c.norm_eps, name="norm")(x + look_up("segment", c.num_segments, segments))


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
class Bert:
    """The model as pure functions of its parameters; hashable, so that it can be closed over or passed as static.

    `start` is the first layer that `apply` runs: with it, batches carry `hidden` [B, T, D], what `prefix` made of the layers
    below, in place of `input_ids`. Layers that nothing adapts are run once for each record so, not once for each step.
    """

    config: BertConfig
    dtype: jnp.dtype = jnp.float32
    start: int = 0

    def init(self, key):
        """Random parameters (normal 0.02, zero biases) in the layout of `apply`; for tests and shapes."""
        c, ids = self.config, jnp.zeros((1, 2), jnp.int32)
        x, keys = jnp.zeros((1, 2, c.width)), jax.random.split(key, c.num_layers + 3)
        block = lambda key: Block(c).init(key, x, jnp.ones((1, 1, 2), bool))["params"]  # noqa: E731
        params = {"embed": Embed(c).init(keys[0], ids, ids, ids)["params"], "layers": jax.vmap(block)(keys[3:])}
        if c.num_labels is None:
            params["mlm"] = {"transform": Transform(c).init(keys[1], x)["params"], "bias": jnp.zeros(c.vocab_size)}
        else:
            if c.pooling == "pooler":
                params["pooler"] = Dense(c.width).init(keys[1], x)["params"]
            kernel = 0.02 * jax.random.normal(keys[2], (c.width, c.num_labels))
            params["head"] = {"kernel": kernel, "bias": jnp.zeros(c.num_labels)}
        return jax.tree.map(lambda p: p.astype(self.dtype), params)

    def apply(self, params, batch, adapter=None):
        """Logits, float32: [B, T, V] of a masked language model, [B, num_labels] of a classifier.

        `batch`: `input_ids` [B, T] int32; optional `attention_mask` [B, T] (1 = attended; absent = all), `token_type_ids`
        and `position_ids` [B, T]. `adapter` as `lora.init` makes it.
        """
        c, adapter = self.config, lora.with_frozen(params, adapter) or {}
        x, mask = batch["hidden"] if self.start else self._embed(params, batch), attended(batch)
        x = self._layers(params, x.astype(self.dtype), mask, slice(self.start, None), adapter.get("layers"))
        if c.num_labels is None:
            x = Transform(c).apply({"params": params["mlm"]["transform"]}, x)
            vocabulary = params["embed"]["word"].astype(x.dtype)
            logits = jnp.einsum("btd,vd->btv", x, vocabulary, preferred_element_type=jnp.float32)
            return logits + params["mlm"]["bias"].astype(jnp.float32)
        pooled = self._pool(params, x, mask, adapter.get("layers", {}).get("pooler"))
        return lora.head(features.prepared(pooled, params), adapter.get("head", params["head"]))

    def features(self, params, batch):
        """What a classifier's head reads of each row, before any centring: float32 [B, D]."""
        return self._pool(params, self.prefix(params, batch, self.config.num_layers), attended(batch))

    def prefix(self, params, batch, layers):
        """What the first `layers` layers make of `batch` -> [B, T, D]: `hidden` for a model of that `start`."""
        x = self._embed(params, batch).astype(self.dtype)
        return self._layers(params, x, attended(batch), slice(layers), None)

    def _embed(self, params, batch):
        ids = batch["input_ids"]
        positions = batch.get("position_ids", jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape))
        segments = batch.get("token_type_ids", jnp.zeros_like(ids))
        return Embed(self.config).apply({"params": params["embed"]}, ids, positions, segments)

    def _layers(self, params, x, mask, span, adapter):
        def block(layer, x, pairs, _):
            return Block(self.config).apply({"params": layer}, x, mask[:, None], pairs), None

        layers = jax.tree.map(lambda p: p[span], params["layers"])
        adapter = {name: pair for name, pair in (adapter or {}).items() if self.targets[name].layered}
        if not jax.tree.leaves(layers)[0].shape[0]:
            return x
        return run_layers(block, layers, x, adapter, self.config.remat)[0]

    def _pool(self, params, x, mask, pair=None):
        """One feature vector a row, float32 [B, D]; `pair` adapts the pooler."""
        if self.config.pooling == "pooler":
            pooled = Dense(self.config.width).apply({"params": params["pooler"]}, x[:, :1])
            # Over all tokens, as every adapted matrix: clipping takes their number to be the rows'.
            if pair is not None:
                pooled = pooled + lora.product(x, jax.tree.map(lambda p: p[0], pair))[:, :1]
            pooled = jnp.tanh(pooled)[:, 0].astype(jnp.float32)
        else:
            weights = mask[..., None].astype(jnp.float32)
            pooled = (x.astype(jnp.float32) * weights).sum(1) / jnp.maximum(weights.sum(1), 1)
        if self.config.normalize:
            # The square root's gradient at 0 is infinite: the floor lies inside it, so that an empty row has gradient 0.
            pooled = pooled * jax.lax.rsqrt(jnp.maximum(jnp.square(pooled).sum(-1, keepdims=True), 1e-24))
        return pooled

    @property
    def targets(self):
        """The matrices that an adapter may name: {target: Target}."""
        d, m, prefix = self.config.width, self.config.mlp_width, "bert.encoder.layer.{}."
        attention = {
            name: Target((name, "kernel"), (d, d), (name[0], name), prefix + f"attention.self.{name}")
            for name in ("query", "key", "value")
        }
        above = {}
        if self.config.num_labels is not None and self.config.pooling == "pooler":
            above = {"pooler": Target(("pooler", "kernel"), (d, d), ("pooler",), "bert.pooler.dense")}
        return (
            attention
            | {
                "output": Target(("output", "kernel"), (d, d), ("o", "output"), prefix + "attention.output.dense"),
                "up": Target(("up", "kernel"), (d, m), ("up", "intermediate"), prefix + "intermediate.dense"),
                "down": Target(("down", "kernel"), (m, d), ("down",), prefix + "output.dense"),
            }
            | above
        )

    head_name = "classifier"  # the head's module in the Hugging Face layout, for checkpoints and PEFT files

    def weights(self):
        """Where each parameter lies in a Hugging Face checkpoint: a list of Weight."""
        layer = {
            "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
            "output": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
        }  # fmt: skip
        table = [
            Weight(("layers", ours, part), f"encoder.layer.{{}}.{theirs}", part)
            for ours, theirs in layer.items()
            for part in ("kernel", "bias")
        ]
        norms = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}
        table += [
            Weight(("layers", ours, "norm", part), f"encoder.layer.{{}}.{theirs}", part)
            for ours, theirs in norms.items()
            for part in ("scale", "bias")
        ]
        table += [
            Weight(("embed", ours), f"embeddings.{theirs}_embeddings", "embedding")
            for ours, theirs in (("word", "word"), ("position", "position"), ("segment", "token_type"))
        ]
        table += [Weight(("embed", "norm", "norm", part), "embeddings.LayerNorm", part) for part in ("scale", "bias")]
        if self.config.num_labels is None:
            head = [
                Weight(("mlm", "transform", "dense", part), "cls.predictions.transform.dense", part)
                for part in ("kernel", "bias")
            ]
            head += [
                Weight(("mlm", "transform", "norm", "norm", part), "cls.predictions.transform.LayerNorm", part)
                for part in ("scale", "bias")
            ]
            head += [Weight(("mlm", "bias"), "cls.predictions", "bias")]
        else:
            head = [Weight(("head", part), self.head_name, part) for part in ("kernel", "bias")]
            if self.config.pooling == "pooler":
                table += [Weight(("pooler", part), "pooler.dense", part) for part in ("kernel", "bias")]
        return [dataclasses.replace(w, name="bert." + w.name) for w in table] + [
            dataclasses.replace(w, optional=True) for w in head
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
