"""Per-example clipping: the sum over a batch of gradients, each cut to a norm (Abadi et al. 2016, algorithm 1).

Letters: B rows.
"""

import jax
import jax.numpy as jnp

from dplora_jax import lora
from dplora_jax.losses import ModelLoss, as_batch_of_one

FORMS = ("auto", "vmap", "broadcast", "ghost")
# Per-row gradients beyond this many bytes are not worth forming: `auto` then takes ghost norms and a second backward pass.
PER_ROW_BYTES = 1 << 30


def clipped_grad_sum(loss_fn, adapter, batch, clip_norm, weights=None, form="auto"):
    """Sum over rows of w_i g_i min(1, clip_norm / |g_i|) -> (grad_sum, per_example_norms, per_example_losses).

    `loss_fn(adapter, batch) -> [B]`; `batch` leaves are [B, ...]; `weights` [B] in [0, 1] (absent = 1), so that one row moves
    the sum by at most `clip_norm` in L2 norm. `grad_sum` has the adapter's tree; norms [B] float32 are from before
    clipping, over all leaves together; losses [B] float32. A row of weight 0 adds nothing and reports norm 0. A row whose
    gradient is not finite adds nothing and reports norm inf.

    `form`: "vmap" is the definition, each example as a batch of one, for any loss_fn. "broadcast" gets all rows' gradients
    from one batched backward pass. "ghost" forms none of them: norms in a first backward pass, the weighted sum in a second.
    The last two need a `losses.ModelLoss`; "auto" picks among them from the shapes, and takes "vmap" for any other loss_fn.
    Raises ValueError on an unknown form, or a fast form of another loss_fn.
    """
    if form not in FORMS:
        raise ValueError(f"unknown clipping form {form!r}; known: {', '.join(FORMS)}.")
    if form in ("broadcast", "ghost") and not isinstance(loss_fn, ModelLoss):
        raise ValueError(f"form {form!r} needs a loss made by dplora_jax.losses; form 'vmap' serves any other.")
    rows = jax.tree.leaves(batch)[0].shape[0]
    weights = jnp.ones(rows, jnp.float32) if weights is None else weights.astype(jnp.float32)
    if form == "auto":
        large = 4 * rows * lora.count(adapter) > PER_ROW_BYTES
        form = ("ghost" if large else "broadcast") if isinstance(loss_fn, ModelLoss) else "vmap"
    if form == "ghost":
        return _ghost(loss_fn, adapter, batch, clip_norm, weights)
    per_row = _vmap if form == "vmap" else _broadcast
    grads, losses = per_row(loss_fn, adapter, batch)
    squares = sum(jnp.square(g.astype(jnp.float32)).reshape(rows, -1).sum(1) for g in jax.tree.leaves(grads))
    factors, norms = _factors(squares, clip_norm, weights)
    return jax.tree.map(lambda g: _weighted_sum(factors, g), grads), norms, losses


def _factors(squares, clip_norm, weights):
    """What each row's gradient is multiplied by, and its reported norm, from squared norms [B]."""
    norms = jnp.sqrt(squares)
    finite = jnp.isfinite(norms)
    factors = weights * clip_norm / jnp.maximum(norms, clip_norm)
    counted = weights > 0
    return jnp.where(finite & counted, factors, 0), jnp.where(counted, jnp.where(finite, norms, jnp.inf), 0)


def _weighted_sum(factors, g):
    """sum_i factors_i g_i, in which a factor of 0 silences whatever the row holds (0 * nan is nan)."""
    kept = jnp.where((factors > 0).reshape(-1, *[1] * (g.ndim - 1)), g, 0)
    return jnp.tensordot(factors, kept.astype(jnp.float32), 1, precision=lora.EXACT).astype(g.dtype)


def _vmap(loss_fn, adapter, batch):
    def one(example):
        loss, grad = jax.value_and_grad(lambda a: loss_fn(a, as_batch_of_one(example))[0])(adapter)
        return grad, loss

    return jax.vmap(one)(batch)


def _slots(adapter, shape_of):
    return jax.tree.map(lambda leaf: jnp.zeros(shape_of(leaf), jnp.float32), adapter)


def _broadcast(loss_fn, adapter, batch):
    rows = jax.tree.leaves(batch)[0].shape[0]

    def total(slots):
        losses = loss_fn(lora.with_slots(adapter, slots), batch)
        return losses.sum(), losses

    return jax.grad(total, has_aux=True)(_slots(adapter, lambda leaf: (rows, *leaf.shape)))


def _ghost(loss_fn, adapter, batch, clip_norm, weights):
    def forward(adapter, slot):
        return loss_fn(lora.with_slots(adapter, jax.tree.map(lambda _: slot, adapter)), batch)

    losses, pull = jax.vjp(lambda slot: forward(adapter, slot), jnp.zeros_like(weights))
    (squares,) = pull(jnp.ones_like(losses))
    factors, norms = _factors(squares, clip_norm, weights)
    _, pull = jax.vjp(lambda adapter: forward(adapter, factors), adapter)
    (grads,) = pull(jnp.ones_like(losses))
    return grads, norms, losses
