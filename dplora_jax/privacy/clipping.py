"""Per-example clipping: the sum over a batch of gradients, each cut to a norm (Abadi et al. 2016, algorithm 1).

Letters: B rows.
"""

import jax
import jax.numpy as jnp

from dplora_jax import lora
from dplora_jax.losses import ModelLoss, as_batch_of_one
from dplora_jax.privacy import integers

FORMS = ("auto", "vmap", "broadcast", "ghost")
MODES = ("flat", "per_layer", "automatic")
# Per-row gradients beyond this many bytes are not worth forming: `auto` then takes ghost norms and a second backward pass.
PER_ROW_BYTES = 1 << 30
STABILITY = 0.01  # gamma of automatic clipping (Bu et al. 2023, section 4.2): how small a gradient keeps its size


def clipped_grad_sum(loss_fn, adapter, batch, clip_norm, weights=None, form="auto", mode="flat", bits=None):
    """Sum over rows of w_i g_i min(1, clip_norm / |g_i|) -> (grad_sum, per_example_norms, per_example_losses).

    `loss_fn(adapter, batch) -> [B]`; `batch` leaves are [B, ...]; `weights` [B] in [0, 1] (absent = 1), so that one row moves
    the sum by at most `clip_norm` in L2 norm. `grad_sum` has the adapter's tree; norms [B] float32 are from before
    clipping, over all leaves together; losses [B] float32. A row of weight 0 adds nothing and reports norm 0. A row whose
    gradient is not finite adds nothing and reports norm inf.

    `form`: "vmap" is the definition, each example as a batch of one, for any loss_fn. "broadcast" gets all rows' gradients
    from one batched backward pass. "ghost" forms none of them: norms in a first backward pass, the weighted sum in a second.
    The last two need a `losses.ModelLoss`; "auto" picks among them from the shapes, and takes "vmap" for any other loss_fn.

    `mode`: "flat" as above. "per_layer" cuts each of the m parts of `lora.groups` to clip_norm / sqrt(m) by its own norm, so
    that all together stay within clip_norm (McMahan et al. 2018, section 3.1). "automatic" scales every row, small ones too, to
    clip_norm |g| / (|g| + STABILITY) (Bu et al. 2023, equation 4.1). In each, a row moves the sum by at most `clip_norm`.

    With `bits`, the sum is a tree of int32 in units of clip_norm 2^-bits: each row is truncated to that grid, and moves the
    sum by at most 2^bits units, in exact arithmetic (`integers.clipped_sum`). "ghost" has no rows to truncate.
    Raises ValueError on an unknown form or mode, a fast form of another loss_fn, or "ghost" with `bits`.
    """
    if form not in FORMS:
        raise ValueError(f"unknown clipping form {form!r}; known: {', '.join(FORMS)}.")
    if mode not in MODES:
        raise ValueError(f"unknown clipping mode {mode!r}; known: {', '.join(MODES)}.")
    if form in ("broadcast", "ghost") and not isinstance(loss_fn, ModelLoss):
        raise ValueError(f"form {form!r} needs a loss made by dplora_jax.losses; form 'vmap' serves any other.")
    if form == "ghost" and bits is not None:
        raise ValueError("form 'ghost' makes no rows' gradients, and integers are made of each row's.")
    rows = jax.tree.leaves(batch)[0].shape[0]
    weights = jnp.ones(rows, jnp.float32) if weights is None else weights.astype(jnp.float32)
    if form == "auto":
        large = 4 * rows * lora.count(adapter) > PER_ROW_BYTES and bits is None
        form = ("ghost" if large else "broadcast") if isinstance(loss_fn, ModelLoss) else "vmap"
    parts = lora.groups(adapter) if mode == "per_layer" else (1, jax.tree.map(lambda _: 0, adapter))
    if form == "ghost":
        return _ghost(loss_fn, adapter, batch, clip_norm, weights, mode, parts)
    per_row = _vmap if form == "vmap" else _broadcast
    grads, losses = per_row(loss_fn, adapter, batch)
    factors, norms = _factors(_squares(grads, parts), clip_norm, weights, mode)
    if bits is not None:
        factors = _spread(factors * (integers.MARGIN * 2.0**bits / clip_norm), parts)
        return integers.clipped_sum(factors, grads, bits), norms, losses
    return jax.tree.map(_weighted_sum, _spread(factors, parts), grads), norms, losses


def _spread(values, parts):
    """Each leaf's own columns of `values` [B, m]: a tree of [B], or of [B, L] for a leaf that is stacked over layers."""
    return jax.tree.map(lambda part: values[:, part], parts[1])


def _squares(grads, parts):
    """Squared norms [B, m] of the parts of rows' gradients."""
    rows = jax.tree.leaves(grads)[0].shape[0]
    squares = jnp.zeros((rows, parts[0]), jnp.float32)
    for part, g in zip(jax.tree.leaves(parts[1]), jax.tree.leaves(grads), strict=True):
        stacked = g.shape[: 1 + isinstance(part, slice)]
        squares = squares.at[:, part].add(jnp.square(g.astype(jnp.float32)).reshape(*stacked, -1).sum(-1))
    return squares


def _factors(squares, clip_norm, weights, mode):
    """What each part [B, m] of a row's gradient is multiplied by, and the row's reported norm [B], from squared norms [B, m]."""
    norms, own = jnp.sqrt(squares.sum(1)), jnp.sqrt(squares)
    share = clip_norm / squares.shape[1] ** 0.5
    factors = weights[:, None] * share / (own + STABILITY if mode == "automatic" else jnp.maximum(own, share))
    finite, counted = jnp.isfinite(norms), weights > 0
    factors = jnp.where((finite & counted)[:, None], factors, 0)
    return factors, jnp.where(counted, jnp.where(finite, norms, jnp.inf), 0)


def _weighted_sum(factors, g):
    """sum_i factors_i g_i for factors [B], or [B, L] over a stacked leaf; a factor of 0 silences whatever the row holds (0 * nan
    is nan)."""
    over = factors.reshape(*factors.shape, *[1] * (g.ndim - factors.ndim))
    kept = jnp.where(over > 0, g, 0).astype(jnp.float32)
    if factors.ndim == 1:
        return jnp.tensordot(factors, kept, 1, precision=lora.EXACT).astype(g.dtype)
    return jnp.einsum("bl,bl...->l...", factors, kept, precision=lora.EXACT).astype(g.dtype)


def _vmap(loss_fn, adapter, batch):
    def one(example):
        loss, grad = jax.value_and_grad(lambda a: loss_fn(a, as_batch_of_one(example))[0])(adapter)
        return grad, loss

    return jax.vmap(one)(batch)


def _broadcast(loss_fn, adapter, batch):
    rows = jax.tree.leaves(batch)[0].shape[0]

    def total(slots):
        losses = loss_fn(lora.with_slots(adapter, slots), batch)
        return losses.sum(), losses

    slots = jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape), jnp.float32), adapter)
    return jax.grad(total, has_aux=True)(slots)


def _ghost(loss_fn, adapter, batch, clip_norm, weights, mode, parts):
    def forward(adapter, factors):
        return loss_fn(lora.with_slots(adapter, _spread(factors, parts)), batch)

    zeros = jnp.zeros((weights.shape[0], parts[0]), jnp.float32)
    losses, pull = jax.vjp(lambda slots: forward(adapter, slots), zeros)
    (squares,) = pull(jnp.ones_like(losses))
    factors, norms = _factors(squares, clip_norm, weights, mode)
    _, pull = jax.vjp(lambda adapter: forward(adapter, factors), adapter)
    (grads,) = pull(jnp.ones_like(losses))
    return grads, norms, losses
