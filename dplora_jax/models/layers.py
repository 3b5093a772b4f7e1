"""What the model families share: dense layers that take an adapter, norms, attention, activations, the stack of layers.

Letters: B rows, T tokens, S attended tokens, L layers, D width, H heads, K head width. Matrix products run in the input's
dtype; norms, softmax and everything after them in float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from dplora_jax import lora

ACTIVATIONS: dict[str, Callable] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


# A stack this shallow is unrolled: a scan copies every residual into a stacked buffer and back, a quarter of a CPU's time.
SHALLOW = 6


class Dense(nn.Module):
    """x W + bias, plus the product of an adapter's pair when one is given: [B, T, I] -> [B, T, O]."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, pair=None):
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
        y = x @ kernel.astype(x.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y if pair is None else y + lora.product(x, pair)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32, returned in the input's dtype."""

    eps: float

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(epsilon=self.eps, dtype=jnp.float32, use_fast_variance=False, name="norm")(
            x.astype(jnp.float32)
        )
        return y.astype(x.dtype)


def attention(q_BxTxD, k_BxSxD, v_BxSxD, num_heads, mask_BxTxS):
    """Scaled dot-product attention of `num_heads` heads; `mask` [B, 1 or T, S] is True where a token may be attended."""
    q, k, v = (rearrange(x, "b t (h k) -> b h t k", h=num_heads) for x in (q_BxTxD, k_BxSxD, v_BxSxD))
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    # A finite floor: a row with nothing to attend then gets uniform weights instead of nan.
    scores = jnp.where(mask_BxTxS[:, None], scores, jnp.finfo(jnp.float32).min)
    out = jnp.einsum("bhts,bhsk->bhtk", jax.nn.softmax(scores).astype(v.dtype), v)
    return rearrange(out, "b h t k -> b t (h k)")


def run_layers(block, params, x, adapter=None, remat=False):
    """Fold x through the stacked layers: `block(layer_params, x, layer_adapter) -> x`, one scan however deep the model
    (unrolled when very shallow).

    `params` leaves are [L, ...]. `adapter` is {target: lora.Pair} with leaves [L', ...] for the last L' <= L layers: those
    below take no part in the backward pass at all.
    """
    body = jax.checkpoint(block) if remat else block

    def scan(x, layers, pairs):
        if jax.tree.leaves(layers)[0].shape[0] <= SHALLOW:
            for i in range(jax.tree.leaves(layers)[0].shape[0]):
                x = body(jax.tree.map(lambda p, i=i: p[i], layers), x, jax.tree.map(lambda p, i=i: p[i], pairs))
            return x
        return jax.lax.scan(lambda x, layer: (body(layer[0], x, layer[1]), None), x, (layers, pairs))[0]

    depth = jax.tree.leaves(params)[0].shape[0]
    if not depth or not adapter:
        return scan(x, params, None) if depth else x
    plain = depth - jax.tree.leaves(adapter)[0].shape[0]
    if plain:
        x = scan(x, jax.tree.map(lambda p: p[:plain], params), None)
    return scan(x, jax.tree.map(lambda p: p[plain:], params), adapter)


def attended(batch):
    """The mask [B, T] of `batch`, True where a token is attended; all of them when it carries none."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return mask.astype(bool)
    return jnp.ones((batch["input_ids"] if "input_ids" in batch else batch["hidden"]).shape[:2], bool)
