"""Per-example clipping: the sum over a batch of gradients, each cut to a norm (Abadi et al. 2016, algorithm 1).

Letters: B rows.
"""

import functools

import jax
import jax.numpy as jnp

from dplora_jax import lora, per_row
from dplora_jax.losses import ModelLoss, as_batch_of_one
from dplora_jax.privacy import integers

FORMS = ("auto", "vmap", "broadcast", "bookkeeping", "ghost")
MODES = ("flat", "per_layer", "automatic")
# Beyond this many bytes, what one backward pass would leave of all rows is too much, and `auto` takes ghost norms and a second
# pass.
ONE_PASS_BYTES = 4 << 30
STABILITY = 0.01  # gamma of automatic clipping (Bu et al. 2023, section 4.2): how small a gradient keeps its size


def clipped_grad_sum(
    loss_fn, adapter, batch, clip_norm, weights=None, form="auto", mode="flat", bits=None, owners=None
):
    """Sum over rows of w_i g_i min(1, clip_norm / |g_i|) -> (grad_sum, per_example_norms, per_example_losses).

    `loss_fn(adapter, batch) -> [B]`; `batch` leaves are [B, ...]; `weights` [B] in [0, 1] (absent = 1), so that one row moves
    the sum by at most `clip_norm` in L2 norm. `grad_sum` has the adapter's tree; norms [B] float32 are from before
    clipping, over all leaves together; losses [B] float32. A row of weight 0 adds nothing and reports norm 0. A row whose
    gradient is not finite adds nothing and reports norm inf.

    `form`: "vmap" is the definition, each example as a batch of one, for any loss_fn. The others need a `losses.ModelLoss`.
    "broadcast" gets all rows' gradients from one batched backward pass. "bookkeeping" gets their norms from one such pass, and
    the sum from what it kept of it (Bu et al. 2023, algorithm 1). "ghost" keeps nothing: norms in a first pass, the sum in a
    second. "auto" takes for each matrix whichever of the first two leaves less, "ghost" where that is over ONE_PASS_BYTES in all,
    and "vmap" for any other loss_fn.

    `mode`: "flat" as above. "per_layer" cuts each of the m parts of `lora.groups` to clip_norm / sqrt(m) by its own norm, so
    that all together stay within clip_norm (McMahan et al. 2018, section 3.1). "automatic" scales every row, small ones too, to
    clip_norm |g| / (|g| + STABILITY) (Bu et al. 2023, equation 4.1). In each, a row moves the sum by at most `clip_norm`.

    With `bits`, the sum is a tree of int32 in units of clip_norm 2^-bits: each row is truncated to that grid, and moves the
    sum by at most 2^bits units, in exact arithmetic (`integers.clipped_sum`). "ghost" and "bookkeeping" have no rows to truncate.

    With `owners` (owner [B] int32, how many K), the sums of each owner's rows come apart, leaves [K, ...].
    Raises ValueError on an unknown form or mode, a fast form of another loss_fn, or "ghost" or "bookkeeping" with `bits`.
    """
    if form not in FORMS:
        raise ValueError(f"unknown clipping form {form!r}; known: {', '.join(FORMS)}.")
    if mode not in MODES:
        raise ValueError(f"unknown clipping mode {mode!r}; known: {', '.join(MODES)}.")
    if form not in ("auto", "vmap") and not isinstance(loss_fn, ModelLoss):
        raise ValueError(f"form {form!r} needs a loss made by dplora_jax.losses; form 'vmap' serves any other.")
    if form in ("ghost", "bookkeeping") and (bits is not None or owners is not None):
        raise ValueError(f"form {form!r} makes no rows' gradients, which integers and sums by owner are made of.")
    if bits is not None and owners is not None:
        raise ValueError("integers are not summed by owner.")
    rows = jax.tree.leaves(batch)[0].shape[0]
    weights = jnp.ones(rows, jnp.float32) if weights is None else weights.astype(jnp.float32)
    form, slots = _chosen(form, loss_fn, adapter, batch, rows, bits is not None or owners is not None)
    parts = lora.groups(adapter) if mode == "per_layer" else (1, jax.tree.map(lambda _: 0, adapter))
    if form == "ghost":
        return _ghost(loss_fn, adapter, batch, clip_norm, weights, mode, parts)
    found, losses = _vmap(loss_fn, adapter, batch) if form == "vmap" else _one_pass(loss_fn, adapter, batch, slots)
    factors, norms = _factors(_squares(found, parts), clip_norm, weights, mode)
    if bits is not None:
        factors = _spread(factors * (integers.MARGIN * 2.0**bits / clip_norm), parts)
        return integers.clipped_sum(factors, found, bits), norms, losses
    add = _weighted_sum if owners is None else functools.partial(_sums_by_owner, *owners)
    return jax.tree.map(add, _spread(factors, parts), found), norms, losses


def slots_of(form, loss_fn, adapter, batch):
    """What one backward pass leaves of all rows for `clipped_grad_sum`, as jax.ShapeDtypeStruct; None where it is no one pass."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    return jax.eval_shape(lambda: _chosen(form, loss_fn, adapter, batch, rows, False)[1])


def _chosen(form, loss_fn, adapter, batch, rows, by_row):
    """The form that `form` stands for, and the slots that its one backward pass fills (None where it has none)."""
    if form in ("vmap", "ghost") or not isinstance(loss_fn, ModelLoss):
        return ("ghost" if form == "ghost" else "vmap"), None
    tokens, dtype = loss_fn.activations(batch) if "layers" in adapter else (None, None)
    whole = form == "broadcast" or by_row

    def kept(leaf):
        _, outputs, inputs = leaf.shape
        return not whole and (form == "bookkeeping" or per_row.keeps_less(tokens, outputs, inputs, dtype))

    slots = per_row.zeros(adapter, rows, kept, tokens, dtype)
    large = sum(slot.nbytes for slot in jax.tree.leaves(slots)) > ONE_PASS_BYTES and not by_row
    return ("ghost", None) if form == "auto" and large else (form, slots)


def _spread(values, parts):
    """Each leaf's own columns of `values` [B, m]: a tree of [B], or of [B, L] for a leaf that is stacked over layers."""
    return jax.tree.map(lambda part: values[:, part], parts[1])


def _squares(found, parts):
    """Squared norms [B, m] of the parts of rows' gradients."""
    leaves = jax.tree.leaves(found, is_leaf=_is_kept)
    rows = leaves[0].squares.shape[1] if _is_kept(leaves[0]) else leaves[0].shape[0]
    squares = jnp.zeros((rows, parts[0]), jnp.float32)
    for part, leaf in zip(jax.tree.leaves(parts[1]), leaves, strict=True):
        by_layer = isinstance(part, slice)
        if _is_kept(leaf):
            own = leaf.squares.T if by_layer else leaf.squares.sum(0)
        else:
            own = jnp.square(leaf.astype(jnp.float32)).reshape(*leaf.shape[: 1 + by_layer], -1).sum(-1)
        squares = squares.at[:, part].add(own)
    return squares


def _is_kept(leaf):
    return isinstance(leaf, per_row.Kept)


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
    if _is_kept(g):
        return per_row.kept_sum(factors, g)
    over = factors.reshape(*factors.shape, *[1] * (g.ndim - factors.ndim))
    kept = jnp.where(over > 0, g, 0).astype(jnp.float32)
    if factors.ndim == 1:
        return jnp.tensordot(factors, kept, 1, precision=per_row.EXACT).astype(g.dtype)
    return jnp.einsum("bl,bl...->l...", factors, kept, precision=per_row.EXACT).astype(g.dtype)


def _sums_by_owner(owner, count, factors, g):
    """`_weighted_sum` of each owner's rows -> [count, ...]."""
    over = factors.reshape(*factors.shape, *[1] * (g.ndim - factors.ndim))
    scaled = over * jnp.where(over > 0, g, 0).astype(jnp.float32)
    own = jax.nn.one_hot(owner, count, axis=0)
    return jnp.tensordot(own, scaled, 1, precision=per_row.EXACT).astype(g.dtype)


def _vmap(loss_fn, adapter, batch):
    def one(example):
        loss, grad = jax.value_and_grad(lambda a: loss_fn(a, as_batch_of_one(example))[0])(adapter)
        return grad, loss

    return jax.vmap(one)(batch)


def _one_pass(loss_fn, adapter, batch, slots):
    """What one batched backward pass puts into `slots` (`per_row.zeros`), and the losses [B]."""

    def total(slots):
        losses = loss_fn(per_row.with_slots(adapter, slots), batch)
        return losses.sum(), losses

    return jax.grad(total, has_aux=True)(slots)


def _ghost(loss_fn, adapter, batch, clip_norm, weights, mode, parts):
    def forward(adapter, factors):
        return loss_fn(per_row.with_slots(adapter, _spread(factors, parts)), batch)

    zeros = jnp.zeros((weights.shape[0], parts[0]), jnp.float32)
    losses, pull = jax.vjp(lambda slots: forward(adapter, slots), zeros)
    (squares,) = pull(jnp.ones_like(losses))
    factors, norms = _factors(squares, clip_norm, weights, mode)
    _, pull = jax.vjp(lambda adapter: forward(adapter, factors), adapter)
    (grads,) = pull(jnp.ones_like(losses))
    return grads, norms, losses
