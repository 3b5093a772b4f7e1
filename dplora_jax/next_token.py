"""Next-token cross-entropy from hidden states, without the [B, T, V] array of all logits.

Letters: B rows, T tokens, M targets of a row at most, C positions at a time, D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from dplora_jax.models import products
from dplora_jax.models.layers import soft_cap

CHUNK_BYTES = 64 << 20  # of float32 logits that exist at a time


def targets(batch):
    """What each position t < T - 1 is to predict, token t + 1 [B, T-1], and whether it counts [B, T-1] float32."""
    targets_BxT = batch["input_ids"][:, 1:]
    counted = batch.get("loss_mask", batch.get("attention_mask"))
    if counted is None:
        return targets_BxT, jnp.ones_like(targets_BxT, jnp.float32)
    return targets_BxT, counted[:, 1:].astype(jnp.float32)


def loss(hidden_BxTxD, vocabulary_VxD, targets_BxT, counted_BxT, max_targets=None, chunk_bytes=CHUNK_BYTES, cap=None):
    """Mean cross-entropy of each row over the positions that count -> [B] float32; `targets` has T - 1 positions.

    Logits exist for `max_targets` positions a row (None: all), `chunk_bytes` of them at a time (under `vmap` over rows, for each
    row that is mapped). The gradient for `hidden` is
    made in the same pass as the loss, so that no logits are kept or made again. `cap` bounds the logits (`layers.soft_cap`).
    """
    hidden = hidden_BxTxD[:, :-1]
    if max_targets is not None and max_targets < targets_BxT.shape[1]:
        first = jnp.argsort(counted_BxT == 0, axis=1, stable=True)[:, :max_targets]
        hidden = jnp.take_along_axis(hidden, first[..., None], axis=1)
        targets_BxT, counted_BxT = (jnp.take_along_axis(x, first, axis=1) for x in (targets_BxT, counted_BxT))
    weights = counted_BxT / jnp.maximum(counted_BxT.sum(1, keepdims=True), 1)
    rows, positions = targets_BxT.shape
    at_most = max(1, min(positions, chunk_bytes // (4 * rows * vocabulary_VxD.shape[0])))
    pieces = -(-positions // at_most)  # of one size, or the last one would be mostly padding
    return _weighted(hidden, vocabulary_VxD, targets_BxT, weights, -(-positions // pieces), cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _weighted(hidden_BxMxD, vocabulary_VxD, targets_BxM, weights_BxM, at_a_time, cap):
    """sum_m w_bm CE(h_bm V^T, target_bm) -> [B]."""

    def one(carry, chunk):
        hidden, targets, _ = chunk
        return carry, _cross_entropy(_logits(hidden, vocabulary_VxD, cap), targets)

    losses = _over_chunks(one, None, (hidden_BxMxD, targets_BxM, weights_BxM), at_a_time)[1]
    return (losses * weights_BxM).sum(1)


def _forward(hidden, vocabulary, targets, weights, at_a_time, cap):
    def one(carry, chunk):
        hidden, targets, weights = chunk
        logits = _logits(hidden, vocabulary, cap)
        return carry, (_cross_entropy(logits, targets), _grad_hidden(logits, targets, weights, vocabulary, cap))

    losses, grad = _over_chunks(one, None, (hidden, targets, weights), at_a_time)[1]
    return (losses * weights).sum(1), (hidden, vocabulary, targets, weights, losses, grad)


def _backward(at_a_time, cap, residuals, g_B):
    hidden, vocabulary, targets, weights, losses, grad = residuals

    def one(total, chunk):
        hidden, targets, weights = chunk
        error = _error(_logits(hidden, vocabulary, cap), targets, weights * g_B[:, None], cap)
        return total + jnp.einsum("bcv,bcd->vd", error, hidden.astype(jnp.float32)), None

    # Frozen in every run: nothing asks for it then, and the compiler drops the pass.
    start = jnp.zeros(vocabulary.shape, jnp.float32)
    grad_vocabulary = _over_chunks(one, start, (hidden, targets, weights), at_a_time)[0]
    grad_hidden = (grad * g_B[:, None, None]).astype(hidden.dtype)
    return grad_hidden, grad_vocabulary.astype(vocabulary.dtype), None, losses * g_B[:, None]


_weighted.defvjp(_forward, _backward)


def _logits(hidden_BxCxD, vocabulary_VxD, cap):
    return soft_cap(products.einsum("bcd,vd->bcv", hidden_BxCxD, vocabulary_VxD), cap)


def _cross_entropy(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def _error(logits_BxCxV, targets_BxC, weights_BxC, cap):
    """The loss's gradient for h V^T: (softmax - one_hot) w, times a cap's own slope, 1 - tanh^2."""
    hot = jnp.arange(logits_BxCxV.shape[-1]) == targets_BxC[..., None]
    error = (jax.nn.softmax(logits_BxCxV) - hot) * weights_BxC[..., None]
    return error if cap is None else error * (1 - jnp.square(logits_BxCxV / cap))


def _grad_hidden(logits, targets, weights, vocabulary, cap):
    return products.einsum("bcv,vd->bcd", _error(logits, targets, weights, cap), vocabulary)


def _over_chunks(one, carry, arrays, size):
    """Scan `one` over pieces of `size` positions of [B, M, ...] arrays, the last filled up with zeros -> (carry, outputs)."""
    positions = arrays[0].shape[1]
    pieces = -(-positions // size)
    if pieces == 1:
        return one(carry, arrays)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, pieces * size - positions), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, size, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], pieces * size, *x.shape[3:])[:, :positions]

    carry, out = jax.lax.scan(one, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(join, out)
