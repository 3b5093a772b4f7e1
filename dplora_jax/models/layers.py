"""What the model families share: dense layers that take an adapter, norms, attention, activations, the stack of layers.

Letters: B rows, T tokens, S tokens that may be attended, L layers, D width, H query heads, G key and value heads, K head
width. Matrix products run in the narrower dtype of input and weights; norms, rotations and softmax in float32.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from dplora_jax import lora
from dplora_jax.models import products, quantized


@jax.custom_jvp
def gelu(x):
    """x times the normal distribution's own function of x (GELU, Hendrycks and Gimpel 2016), by erf in float32, in x's dtype.
    jax.nn.gelu takes erfc: with its gradient, three times as long on a CPU."""
    wide = x.astype(jnp.float32)
    return (wide * _normal(wide)).astype(x.dtype)


def _normal(x):
    return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))


@gelu.defjvp
def _gelu_slope(primals, tangents):
    (x,), (change,) = primals, tangents
    wide = x.astype(jnp.float32)
    slope = _normal(wide) + wide * jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return gelu(x), change * slope.astype(x.dtype)


ACTIVATIONS: dict[str, Callable] = {
    "gelu": gelu,
    "gelu_fast": functools.partial(jax.nn.gelu, approximate=True),
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
        if self.has_variable("params", "kernel"):  # unchecked: a quantised kernel is a tree, not an array
            kernel = self.get_variable("params", "kernel")
        else:
            kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
        y = (quantized if quantized.is_quantized(kernel) else products).matmul(x, kernel)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y if pair is None else y + lora.product(x, pair)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in float32, returned in the input's dtype."""

    eps: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        norm = nn.LayerNorm(self.eps, jnp.float32, use_bias=self.use_bias, use_fast_variance=False, name="norm")
        y = norm(x.astype(jnp.float32))
        return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """Division by the root mean square of the last axis (Zhang and Sennrich 2019), in float32, returned in the input's
    dtype; then multiplication by `offset` + scale."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x):
        start = nn.initializers.constant(1 - self.offset)
        scale = self.offset + self.param("scale", start, (x.shape[-1],)).astype(jnp.float32)
        y = x.astype(jnp.float32)
        return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps) * scale).astype(x.dtype)


def split_heads(x_BxTxD, heads):
    """[B, T, H K] -> [B, T, H, K]."""
    return rearrange(x_BxTxD, "b t (h k) -> b t h k", h=heads)


def attention(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask_BxTxS, scale=None, cap=None):
    """Scaled dot-product attention -> [B, T, H K]; `mask` [B, 1 or T, S] is True where a token may be attended.

    Query head h attends to key head h G // H (grouped queries, Ainslie et al. 2023). `scale` None is 1 / sqrt(K);
    `cap` bounds the scores (`soft_cap`).
    """
    groups = k_BxSxGxK.shape[2]
    q = rearrange(q_BxTxHxK, "b t (g h) k -> b g h t k", g=groups)
    k, v = (rearrange(x, "b s g k -> b g s k") for x in (k_BxSxGxK, v_BxSxGxK))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bghtk,bgsk->bghts", q, k, preferred_element_type=jnp.float32) * scale
    scores = soft_cap(scores, cap)
    # A finite floor: a row with nothing to attend then gets uniform weights instead of nan.
    scores = jnp.where(mask_BxTxS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    out = jnp.einsum("bghts,bgsk->bghtk", jax.nn.softmax(scores).astype(v.dtype), v)
    return rearrange(out, "b g h t k -> b t (g h k)")


def soft_cap(x, cap):
    """cap tanh(x / cap), between -cap and cap (Gemma 2, section 2); x itself where `cap` is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rotation(positions_BxT, frequencies):
    """(cos, sin) of position times frequency, float32 [B, T, 1, len(frequencies)] (RoPE, Su et al. 2021)."""
    angles = positions_BxT.astype(jnp.float32)[..., None, None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate_halves(x_BxTxHxK, cos, sin):
    """Rotate element i of a head's first R = 2 len(cos) numbers with element i + R/2, as Llama does; the others stay."""
    first, rest = jnp.split(x_BxTxHxK, [2 * cos.shape[-1]], -1)
    turned = _rotated(*jnp.split(first.astype(jnp.float32), 2, -1), cos, sin, -2).astype(first.dtype)
    return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned


def rotate_pairs(x_BxTxHxK, cos, sin):
    """Rotate element 2i of a head with element 2i + 1, as ChatGLM2 does."""
    x = x_BxTxHxK.astype(jnp.float32)
    return _rotated(x[..., ::2], x[..., 1::2], cos, sin, -1).astype(x_BxTxHxK.dtype)


def _rotated(first, second, cos, sin, axis):
    both = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis)
    return both.reshape(*first.shape[:-1], -1)


def run_layers(block, params, x, adapter=None, remat=False, states=None):
    """Fold x through the stacked layers: `block(layer_params, x, layer_adapter, layer_state) -> (x, layer_state)`, one scan
    however deep the model (unrolled when very shallow) -> (x, states).

    `params` leaves are [L, ...], and those of `states` (None, or what each layer remembers, as keys and values). `adapter` is
    {target: lora.Pair} with leaves [L', ...] for the last L' <= L layers: those below take no part in the backward pass.
    """
    body = jax.checkpoint(block) if remat else block
    depth = jax.tree.leaves(params)[0].shape[0]
    adapted = jax.tree.leaves(adapter)[0].shape[0] if adapter else 0
    x, below = _span(body, params, x, None, states, slice(depth - adapted))
    x, above = _span(body, params, x, adapter, states, slice(depth - adapted, depth))
    parts = [part for part, layers in ((below, depth - adapted), (above, adapted)) if layers]
    return x, parts[0] if len(parts) == 1 else jax.tree.map(lambda *s: jnp.concatenate(s), *parts) if parts else states


def _span(body, params, x, adapter, states, span):
    """The layers of `span` alone; `adapter` holds just theirs."""
    depth = span.stop - (span.start or 0)
    if not depth:
        return x, None
    layers, states = jax.tree.map(lambda p: p[span], (params, states))
    stack = layers, adapter, states
    # Unrolled, a compiler expands the few-bit kernels of all layers at once.
    few_bits = any(map(quantized.is_quantized, jax.tree.leaves(layers, is_leaf=quantized.is_quantized)))
    if depth > SHALLOW or few_bits:
        return jax.lax.scan(lambda x, layer: body(layer[0], x, *layer[1:]), x, stack)
    out = []
    for i in range(depth):
        layer, pairs, state = jax.tree.map(lambda p, i=i: p[i], stack)
        x, state = body(layer, x, pairs, state)
        out.append(state)
    return x, jax.tree.map(lambda *s: jnp.stack(s), *out)


def at_last(x_BxTxD, mask_BxT):
    """`x` at the last token of each row that `mask` attends to: [B, D]."""
    last_B = jnp.max(jnp.where(mask_BxT, jnp.arange(mask_BxT.shape[1]), 0), axis=1)
    return jnp.take_along_axis(x_BxTxD, last_B[:, None, None], axis=1)[:, 0]


def attended(batch):
    """The mask [B, T] of `batch`, True where a token is attended; all of them when it carries none."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return mask.astype(bool)
    return jnp.ones((batch["input_ids"] if "input_ids" in batch else batch["hidden"]).shape[:2], bool)
