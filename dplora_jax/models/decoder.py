"""What the decoders share: next-token logits, a classifier on the last token, and a cache of keys and values.

Letters: B rows, T tokens, S slots of a cache, L layers, D width, G key and value heads, K head width, V vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dplora_jax import lora
from dplora_jax.models import products
from dplora_jax.models.family import Weight
from dplora_jax.models.layers import at_last, attended, run_layers, soft_cap


class Cache(NamedTuple):
    """What generation remembers: `keys` and `values` [L, B, S, G, K], each slot's place in its row's `order` [B, S] and whether
    it is `valid` [B, S], and how many slots are `used` (int32)."""

    keys: Any
    values: Any
    order: Any
    valid: Any
    used: Any


class OwnHeads:
    """Of a config with `width` and `num_heads`: every head has a query, a key and a value of its own, all of one width."""

    @property
    def num_kv_heads(self):
        """Heads of keys and values."""
        return self.num_heads

    @property
    def head_width(self):
        """Numbers in one head's query."""
        return self.width // self.num_heads


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A causal language model (`config.num_labels` None), or a classifier on its last attended token, as pure functions.

    A family gives `embed`, `block`, `norm`, `targets`, `layer_weights` and `outer_weights`; its config has `num_layers`, `width`,
    `vocab_size`, `num_kv_heads`, `head_width`, `tied`, `remat` and `num_labels`. Hashable, so that it can be closed over.
    `start` is the first layer that `apply` runs: with it, batches carry `hidden` [B, T, D], what `prefix` made of the layers
    below; `input_ids` are then needed for targets alone (and by ChatGLM-6B, for positions and mask).
    `dtype` is that of what flows between the weights, and the weights' own where `param_dtype` is None.
    """

    config: Any
    dtype: jnp.dtype = jnp.float32
    start: int = 0
    param_dtype: jnp.dtype | None = None

    head_name = "score"  # the classification head's module in the Hugging Face layout
    head_has_bias = False
    fan_in_fan_out = False  # whether adapted matrices are stored [inputs, outputs], which PEFT's files must say
    tied_name = "lm_head"  # the output matrix's module, where it is not the embedding
    head_module = "score"  # what PEFT trains and saves whole of a classifier
    head_dense = None
    reads_ids = False  # whether layers above the first read `input_ids`, for positions or masks
    idle = ""  # tensors that another task's model has: a pattern for the whole name
    carried = ()  # tensors that no logit depends on, and that the class of a checkpoint has; {} for the layer

    def init(self, key):
        """Random parameters (normal 0.02, zero biases) in the layout of `apply`; for tests and shapes."""
        c = self.config
        keys = jax.random.split(key, c.num_layers + 3)
        normal = lambda key, *shape: 0.02 * jax.random.normal(key, shape)  # noqa: E731
        params = self.init_outer(keys[0]) | {"layers": jax.vmap(self.init_layer)(keys[3:])}
        if c.num_labels is not None:
            params["head"] = {"kernel": normal(keys[1], c.width, c.num_labels)}
            if self.head_has_bias:
                params["head"]["bias"] = jnp.zeros(c.num_labels)
        elif not c.tied:
            params["lm_head"] = normal(keys[2], c.vocab_size, c.width)
        return jax.tree.map(lambda p: p.astype(self.param_dtype or self.dtype), params)

    def apply(self, params, batch, adapter=None):
        """Logits, float32: [B, T, V] of a language model, [B, num_labels] of a classifier.

        `batch`: `input_ids` [B, T] int32; optional `attention_mask` [B, T] (1 = attended; absent = all) and `position_ids`
        [B, T]. `adapter` as `lora.init` makes it. A classifier reads the last attended token of each row.
        """
        adapter = lora.with_frozen(params, adapter) or {}
        x = self.hidden(params, batch, adapter)
        if self.config.num_labels is None:
            return self.logits(params, x)
        return lora.head(at_last(x, attended(batch)), adapter.get("head", params.get("head")))

    def hidden(self, params, batch, adapter=None):
        """What the last norm puts out: [B, T, D] in the model's dtype; `logits` of it are the model's."""
        adapter = lora.with_frozen(params, adapter) or {}
        x = (batch["hidden"] if self.start else self.embed(params, batch)).astype(self.dtype)
        x, _ = self._layers(params, x, batch, slice(self.start, None), adapter.get("layers"))
        return self.norm(params, x)

    def prefix(self, params, batch, layers):
        """What the first `layers` layers make of `batch` -> [B, T, D]: `hidden` for a model of that `start`."""
        x = self.embed(params, batch).astype(self.dtype)
        return self._layers(params, x, batch, slice(layers), None)[0]

    def vocabulary(self, params):
        """The matrix [V, D] whose product with `hidden` is the logits: the embedding's own where they are tied."""
        return params["embed"]["word"] if self.config.tied else params["lm_head"]

    def logits(self, params, hidden, tokens=slice(None)):
        """Next-token logits [..., V] float32 of hidden states [..., D]; of some `tokens` (their ids [V']) alone, if given."""
        logits = products.einsum("...d,vd->...v", hidden, self.vocabulary(params)[tokens])
        return soft_cap(logits, self.logit_cap)

    @property
    def logit_cap(self):
        """What bounds the logits (`layers.soft_cap`); None in most families."""
        return getattr(self.config, "logit_cap", None)

    def positions(self, batch, order_BxT):
        """The position ids of the tokens at places `order` [B, T] of their rows; `batch` holds the rows, or their beginnings."""
        return batch.get("position_ids", order_BxT)

    def mask(self, batch, order_q, order_k, valid_k):
        """Which tokens [B, S] at places `order_k` the ones at `order_q` [B, T] attend to -> [B, T, S] bool: none after them, and
        with a `window` none before it. Where only some layers have one (`local`), both are there: (without, with)."""
        seen = (order_k[:, None, :] <= order_q[:, :, None]) & valid_k[:, None, :]
        window, local = (getattr(self.config, name, None) for name in ("window", "local"))
        if window is None:
            return seen
        near = seen & (order_q[:, :, None] - order_k[:, None, :] < window)
        return near if local is None else (seen, near)

    def prefill(self, params, batch, size, adapter=None):
        """Run prompts, padded to the right, and remember them -> (logits [B, V] after each prompt's last token, Cache of
        `size` >= T slots)."""
        c, valid = self.config, attended(batch)
        rows, tokens = valid.shape
        empty = jnp.zeros((c.num_layers, rows, size, c.num_kv_heads, c.head_width), self.dtype)
        wide = jnp.pad(valid, [(0, 0), (0, size - tokens)])
        order = jnp.broadcast_to(jnp.arange(size), (rows, size))
        cache = Cache(empty, empty, order, wide, jnp.int32(0))
        places = order[:, :tokens]
        positions, mask = self.positions(batch, places), self.mask(batch, places, order, wide)
        x, cache = self._cached(params, batch["input_ids"], positions, mask, cache, adapter)
        return self.logits(params, at_last(x, valid)), cache

    def extend(self, params, batch, token_B, place_B, cache, adapter=None):
        """One more token a row, at place `place` of its row -> (logits [B, V], Cache). `batch` holds the prompts, without
        `position_ids`."""
        order = jax.lax.dynamic_update_slice_in_dim(cache.order, place_B[:, None], cache.used, 1)
        valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, jnp.ones_like(place_B[:, None], bool), cache.used, 1)
        cache = cache._replace(order=order, valid=valid)
        positions = self.positions(batch, place_B[:, None])
        mask = self.mask(batch, place_B[:, None], order, valid)
        x, cache = self._cached(params, token_B[:, None], positions, mask, cache, adapter)
        return self.logits(params, x[:, 0]), cache

    def _cached(self, params, ids, positions, mask, cache, adapter):
        """Run tokens `ids` [B, T] through all layers, their keys and values going to the next free slots."""
        adapter = lora.with_frozen(params, adapter) or {}
        x = self.embed(params, {"input_ids": ids, "position_ids": positions}).astype(self.dtype)

        def block(layer, x, pairs, state):
            return self.block(layer, x, positions, mask, pairs, (*state, cache.used))

        states = cache.keys, cache.values
        x, (keys, values) = run_layers(block, self.stack(params), x, adapter.get("layers"), states=states)
        return self.norm(params, x), cache._replace(keys=keys, values=values, used=cache.used + ids.shape[1])

    def _layers(self, params, x, batch, span, adapter):
        valid = attended(batch) if batch.get("attention_mask", x[..., 0]).ndim == 2 else jnp.ones(x.shape[:2], bool)
        order = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        positions, mask = self.positions(batch, order), self.mask(batch, order, order, valid)

        def block(layer, x, pairs, _):
            return self.block(layer, x, positions, mask, pairs, None)

        layers = jax.tree.map(lambda p: p[span], self.stack(params))
        if not jax.tree.leaves(layers)[0].shape[0]:
            return x, None
        return run_layers(block, layers, x, adapter, self.config.remat)

    def stack(self, params):
        """The layers' parameters, and whatever else differs from layer to layer: leaves [L, ...]."""
        return params["layers"]

    def weights(self):
        """Where each parameter lies in a Hugging Face checkpoint: a list of Weight."""
        c, table = self.config, [*self.outer_weights(), *self.layer_weights()]
        if c.num_labels is not None:
            parts = ("kernel", "bias") if self.head_has_bias else ("kernel",)
            table += [Weight(("head", part), self.head_name, part, optional=True) for part in parts]
        elif not c.tied:
            table += [Weight(("lm_head",), self.tied_name, "embedding")]
        return table


def remember(state, k_BxTxGxK, v_BxTxGxK):
    """(keys, values, state): what to attend to, and the layer's cache with it; `state` is (keys, values, slot) or None."""
    if state is None:
        return k_BxTxGxK, v_BxTxGxK, None
    keys, values, slot = state
    keys = jax.lax.dynamic_update_slice_in_dim(keys, k_BxTxGxK.astype(keys.dtype), slot, 1)
    values = jax.lax.dynamic_update_slice_in_dim(values, v_BxTxGxK.astype(values.dtype), slot, 1)
    return keys, values, (keys, values)
