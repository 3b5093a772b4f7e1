"""What the encoders share: masked language models, and classifiers on one feature vector a row.

Letters: B rows, T tokens, L layers, D width, V vocabulary.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dplora_jax import lora
from dplora_jax.models import features, products, sentence
from dplora_jax.models.family import Weight
from dplora_jax.models.layers import attended, run_layers


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A masked language model (`config.num_labels` None) or a classifier, as pure functions of its parameters; hashable, so that
    it can be closed over or passed as static.

    A family gives `embed`, `block`, `pooler`, `transform`, an `init_...` for each of their parameters, `targets`, `body_weights`,
    `pooler_weights` and `transform_weights`; its config has `num_layers`, `width`, `vocab_size`, `remat`, `num_labels`,
    `pooling` ("pooler" or "mean") and `normalize`.

    `start` is the first layer that `apply` runs: with it, batches carry `hidden` [B, T, D], what `prefix` made of the layers
    below, in place of `input_ids`. Layers that nothing adapts are run once for each record so, not once for each step.

    `dtype` is that of what flows between the weights, and the weights' own where `param_dtype` is None.
    """

    config: Any
    dtype: jnp.dtype = jnp.float32
    start: int = 0
    param_dtype: jnp.dtype | None = None

    base: ClassVar[str] = ""  # the bare model's name within the others, in the Hugging Face layout
    head_module: ClassVar[str] = "classifier"  # what PEFT trains and saves whole of a classifier
    head_dense: ClassVar[str | None] = None  # the part of it that is the pooler here
    head_output: ClassVar[str | None] = None  # and the part above it
    mlm_bias: ClassVar[str] = ""  # the module that holds the masked language model's output bias
    ties: ClassVar[dict] = {}  # tensors that some checkpoints repeat: {copy: original}
    carried: ClassVar[tuple] = ()  # tensors that no logit depends on, and that the bare model's class has
    idle: ClassVar[str] = ""  # tensors that another task's model has: a pattern for the whole name

    @property
    def head_name(self):
        """The head's module in the Hugging Face layout, for checkpoints and PEFT files."""
        whole = self.head_output is not None and self.config.pooling == "pooler"
        return self.head_output if whole else self.head_module

    @property
    def pooler_key(self):
        """Where the pooler's parameters are: a dense layer that PEFT counts to the head has a place of its own."""
        return "pooler" if self.head_dense is None else lora.HEAD_DENSE

    def init(self, key):
        """Random parameters (normal 0.02, zero biases) in the layout of `apply`; for tests and shapes."""
        c, keys = self.config, jax.random.split(key, self.config.num_layers + 3)
        params = self.init_outer(keys[0]) | {"layers": jax.vmap(self.init_layer)(keys[3:])}
        if c.num_labels is None:
            params["mlm"] = {"transform": self.init_transform(keys[1]), "bias": jnp.zeros(c.vocab_size)}
        else:
            if c.pooling == "pooler":
                params[self.pooler_key] = self.init_pooler(keys[1])
            kernel = 0.02 * jax.random.normal(keys[2], (c.width, c.num_labels))
            params["head"] = {"kernel": kernel, "bias": jnp.zeros(c.num_labels)}
        return jax.tree.map(lambda p: p.astype(self.param_dtype or self.dtype), params)

    def apply(self, params, batch, adapter=None):
        """Logits, float32: [B, T, V] of a masked language model, [B, num_labels] of a classifier.

        `batch`: `input_ids` [B, T] int32; optional `attention_mask` [B, T] (1 = attended; absent = all), `token_type_ids`
        and `position_ids` [B, T]. `adapter` as `lora.init` makes it.
        """
        adapter = lora.with_frozen(params, adapter) or {}
        x, mask = batch["hidden"] if self.start else self.embed(params, batch), attended(batch)
        x = self._layers(params, x.astype(self.dtype), mask, slice(self.start, None), adapter.get("layers"))
        if self.config.num_labels is None:
            x = self.transform(params, x)
            logits = products.einsum("btd,vd->btv", x, params["embed"]["word"])
            return logits + params["mlm"]["bias"].astype(jnp.float32)
        head = adapter.get("head", params["head"])
        dense, pair = head.get("dense", params.get(lora.HEAD_DENSE)), adapter.get("layers", {}).get("pooler")
        pooled = self._pool(params, x, mask, dense, pair)
        return lora.head(features.prepared(pooled, params), head)

    def features(self, params, batch):
        """What a classifier's head reads of each row, before any centring: float32 [B, D]."""
        x = self.prefix(params, batch, self.config.num_layers)
        return self._pool(params, x, attended(batch), params.get(lora.HEAD_DENSE))

    def prefix(self, params, batch, layers):
        """What the first `layers` layers make of `batch` -> [B, T, D]: `hidden` for a model of that `start`."""
        x = self.embed(params, batch).astype(self.dtype)
        return self._layers(params, x, attended(batch), slice(layers), None)

    def masks(self, mask_BxT):
        """What `block` takes for the tokens that may be attended: [B, 1, T]."""
        return mask_BxT[:, None]

    def stack(self, params):
        """The layers' parameters, and whatever else differs from layer to layer: leaves [L, ...]."""
        return params["layers"]

    def _layers(self, params, x, mask, span, adapter):
        masks = self.masks(mask)

        def block(layer, x, pairs, _):
            return self.block(layer, x, masks, pairs), None

        layers = jax.tree.map(lambda p: p[span], self.stack(params))
        adapter = {name: pair for name, pair in (adapter or {}).items() if self.targets[name].layered}
        if not jax.tree.leaves(layers)[0].shape[0]:
            return x
        return run_layers(block, layers, x, adapter, self.config.remat)[0]

    def _pool(self, params, x, mask, dense=None, pair=None):
        """One feature vector a row, float32 [B, D]. `dense`, the head's own, stands for the pooler, which `pair` else adapts."""
        if self.config.pooling == "pooler" or dense is not None:
            pooled = self.pooler(params, x, mask, dense, pair)
        else:
            pooled = mean(self.final(params, x), mask)
        if self.config.normalize:
            # The square root's gradient at 0 is infinite: the floor lies inside it, so that an empty row has gradient 0.
            pooled = pooled * jax.lax.rsqrt(jnp.maximum(jnp.square(pooled).sum(-1, keepdims=True), 1e-24))
        return pooled

    def final(self, params, x):
        """What stands above the last layer, if anything: [B, T, D] -> [B, T, D]."""
        return x

    def weights(self):
        """Where each parameter lies in a Hugging Face checkpoint: a list of Weight."""
        if self.config.num_labels is None:
            head = [*self.transform_weights(), Weight(("mlm", "bias"), self.mlm_bias, "bias")]
        else:
            head = [Weight(("head", part), self.head_name, part) for part in ("kernel", "bias")]
        pooler = self.config.num_labels is not None and self.config.pooling == "pooler"
        return [
            *self.body_weights(),
            *(self.pooler_weights() if pooler else ()),
            *(dataclasses.replace(weight, optional=True) for weight in head),
        ]


def reading(model, adapter):
    """`model` as `adapter` reads it: one whose head has a dense layer of its own reads the first token."""
    if "dense" not in adapter.get("head", {}):
        return model
    return dataclasses.replace(model, config=dataclasses.replace(model.config, pooling="pooler"))


def mean(x_BxTxD, mask_BxT):
    """The mean over attended tokens, float32 [B, D]."""
    weights = mask_BxT[..., None].astype(jnp.float32)
    return (x_BxTxD.astype(jnp.float32) * weights).sum(1) / jnp.maximum(weights.sum(1), 1)


def pooling(hf, checkpoint, pooler, head):
    """(pooling, normalize) of a classifier whose pooler and head are the modules `pooler` and `head`: one of transformers' own
    reads its pooler, whatever else lies in the folder; else as a sentence model's files say; else by the pooler, or the mean
    where there is none."""
    how, normalize = sentence.pooling(checkpoint.directory)
    has_pooler = checkpoint.has(f"{pooler}.weight")
    theirs = any("SequenceClassification" in name for name in hf.get("architectures") or ())
    if how is None or (theirs and has_pooler and checkpoint.has(f"{head}.weight")):
        return ("pooler" if has_pooler else "mean"), False
    return how, normalize
