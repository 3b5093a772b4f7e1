"""Per-example clipping: the sum over a batch of gradients, each cut to a norm (Abadi et al. 2016, algorithm 1).

Letters: B rows.
"""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp

from dplora_jax import lora, per_row
from dplora_jax.losses import ModelLoss, as_batch_of_one
from dplora_jax.privacy import integers

FORMS = ("auto", "vmap", "broadcast", "ghost")
MODES = ("flat", "per_layer", "automatic")
# What one backward pass may leave of its rows, in bytes: where all rows would leave more, they go through a few at a time.
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
    "broadcast" gets all rows' gradients from one batched backward pass. "ghost" makes no row's gradient: norms, and then the sum,
    come of the inputs and cotangents that such a pass leaves (ghost norms and book-keeping, Bu et al. 2023, algorithm 1). "auto"
    takes for each matrix whichever of these two leaves less, and "vmap" for any other loss_fn. Where a pass over all rows would
    leave more than ONE_PASS_BYTES, rows go through a few at a time (not with `owners`: a pool is cut to size by its caller).

    In every form, what is kept of a row is the one source of its norm and of what it adds, and the norm is never too small
    (`per_row.squared_norm`). A row whose norm is above 1e19 clip norms counts as not finite.

    `mode`: "flat" as above. "per_layer" cuts each of the m parts of `lora.groups` to clip_norm / sqrt(m) by its own norm, so
    that all together stay within clip_norm (McMahan et al. 2018, section 3.1). "automatic" scales every row, small ones too, to
    clip_norm |g| / (|g| + STABILITY) (Bu et al. 2023, equation 4.1). In each, a row moves the sum by at most `clip_norm`.

    With `bits`, the sum is a tree of int32 in units of clip_norm 2^-bits: each row is truncated to that grid, and moves the
    sum by at most 2^bits units, in exact arithmetic (`integers.clipped_sum`). "ghost" has no rows to truncate.

    With `owners` (owner [B] int32, how many K), the sums of each owner's rows come apart, leaves [K, ...].
    Raises ValueError on an unknown form or mode, a fast form of another loss_fn, or "ghost" with `bits` or `owners`.
    """
    if form not in FORMS:
        raise ValueError(f"unknown clipping form {form!r}; known: {', '.join(FORMS)}.")
    if mode not in MODES:
        raise ValueError(f"unknown clipping mode {mode!r}; known: {', '.join(MODES)}.")
    if form not in ("auto", "vmap") and not isinstance(loss_fn, ModelLoss):
        raise ValueError(f"form {form!r} needs a loss made by dplora_jax.losses; form 'vmap' serves any other.")
    if form == "ghost" and (bits is not None or owners is not None):
        raise ValueError("form 'ghost' makes no rows' gradients, which integers and sums by owner are made of.")
    if bits is not None and owners is not None:
        raise ValueError("integers are not summed by owner.")
    rows = jax.tree.leaves(batch)[0].shape[0]
    weights = jnp.ones(rows, jnp.float32) if weights is None else weights.astype(jnp.float32)
    slots = _slots(form, loss_fn, adapter, batch, rows, bits is not None or owners is not None)

    def clip_rows(batch, weights):
        kept, losses = _vmap(loss_fn, adapter, batch) if slots is None else _one_pass(loss_fn, adapter, batch, slots)
        # Norm and sum are of these numbers: neither is worked out from anything before them.
        kept = jax.lax.optimization_barrier(kept)
        parts = lora.groups(adapter) if mode == "per_layer" else (1, jax.tree.map(lambda _: 0, adapter))
        factors, norms = _factors(_squares(kept, parts, clip_norm), clip_norm, weights, mode)
        if bits is not None:
            factors = _spread(factors * (integers.MARGIN * 2.0**bits / clip_norm), parts)
            return integers.clipped_sum(factors, kept, bits), norms, losses
        add = _weighted_sum if owners is None else functools.partial(_sums_by_owner, *owners)
        return jax.tree.map(add, _spread(factors, parts), kept), norms, losses

    at_once = rows if slots is None or owners is not None else _rows_at_once(slots, rows)
    if at_once < rows:
        slots = _slots(form, loss_fn, adapter, batch, at_once, bits is not None)
    return in_turns(clip_rows, at_once, batch, weights)


class Clipper(abc.ABC):
    """What a local step does to rows' gradients before its noise, and what most clippers have in common.

    `clip_norm` is the norm before round 1, `moves` says whether it then moves, and `pools` whether rows of several clients may be
    clipped together.
    """

    moves = False
    pools = True

    def kept(self, clients):
        """What each of `clients` clients keeps from round to round, [K, ...]."""
        return ()

    def norm(self, kept):
        """The norm that a client's next step clips to."""
        return self.clip_norm

    @abc.abstractmethod
    def sum(self, loss_fn, adapter, batch, weights, clip_norm, **how):
        """`clipped_grad_sum` of a batch; `how` are its `bits` or `owners`."""

    def count(self, norms, clip_norm, weights):
        """What is noised and shown beside the gradients' sum: {name: number}."""
        return {}

    def stds(self, client, clip_norm):
        """The standard deviation of the noise on (gradients' sum, `count`): a number, or a tree that begins like them."""
        return client.noise_std

    def move(self, kept, count, divisor):
        """What a client keeps after a step, from the noisy `count` and its expected batch size `divisor`."""
        return kept


@dataclasses.dataclass(frozen=True)
class Clip(Clipper):
    """Rows cut to one norm, in one of MODES."""

    clip_norm: float
    mode: str = "flat"
    form: str = "auto"

    def sum(self, loss_fn, adapter, batch, weights, clip_norm, **how):
        """`clipped_grad_sum` in the mode and form."""
        return clipped_grad_sum(loss_fn, adapter, batch, clip_norm, weights, self.form, self.mode, **how)


def clip_each(rows, clip_norm):
    """Every row of a tree of [B, ...] scaled to L2 norm at most `clip_norm` over all its leaves together; one that is not finite
    becomes 0."""
    rows = jax.lax.optimization_barrier(rows)
    parts = 1, jax.tree.map(lambda _: 0, rows)
    squares = _squares(rows, parts, clip_norm)
    factors = _factors(squares, clip_norm, jnp.ones(len(squares)), "flat")[0]
    return jax.tree.map(_scaled, _spread(factors, parts), rows)


def in_turns(clip_rows, size, batch, weights):
    """`clip_rows(batch, weights) -> (sum, norms, losses)` over `size` rows of the batch at a time: sums add up, rows are set side
    by side. The last turn is filled up with rows of weight 0."""
    rows = weights.shape[0]
    if size >= rows:
        return clip_rows(batch, weights)
    turns, clip_rows = (
        -(-rows // size),
        jax.jit(clip_rows, inline=True),
    )  # traced once, for its shapes and for its turns

    def split(x):
        x = jnp.pad(x, [(0, turns * size - rows), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(turns, size, *x.shape[1:])

    def add(total, turn):
        grad, norms, losses = clip_rows(*turn)
        return jax.tree.map(jnp.add, total, grad), (norms, losses)

    turns = jax.tree.map(split, (batch, weights))
    shapes = jax.eval_shape(clip_rows, *jax.tree.map(lambda x: x[0], turns))[0]
    total, by_row = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), turns)
    return total, *(x.reshape(-1)[:rows] for x in by_row)


def slots_of(form, loss_fn, adapter, batch):
    """What one backward pass leaves of all rows for `clipped_grad_sum`, as jax.ShapeDtypeStruct; None where it is not one
    pass."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    return jax.eval_shape(lambda: _slots(form, loss_fn, adapter, batch, rows, False))


def _slots(form, loss_fn, adapter, batch, rows, by_row):
    """The slots that one backward pass over `rows` rows fills in the form that `form` stands for; None for "vmap", which has
    none. With `by_row` each row's gradient is made."""
    if form == "vmap" or not isinstance(loss_fn, ModelLoss):
        return None
    tokens, dtype = loss_fn.activations(batch) if "layers" in adapter else (None, None)
    whole = form == "broadcast" or by_row

    def kept(leaf):
        _, outputs, inputs = leaf.shape
        return not whole and (form == "ghost" or per_row.keeps_less(tokens, outputs, inputs, dtype))

    return per_row.zeros(adapter, rows, kept, tokens, dtype)


def _rows_at_once(slots, rows):
    """How many of `rows` rows leave no more than ONE_PASS_BYTES, at least one; turns are of one size."""
    most = max(1, ONE_PASS_BYTES * rows // max(1, sum(slot.nbytes for slot in jax.tree.leaves(slots))))
    return -(-rows // -(-rows // most))


def _spread(values, parts):
    """Each leaf's own columns of `values` [B, m]: a tree of [B], or of [B, L] for a leaf that is stacked over layers."""
    return jax.tree.map(lambda part: values[:, part], parts[1])


def _squares(kept, parts, clip_norm):
    """Squared norms [B, m] of the parts of rows' gradients, in units of clip_norm^2: what then vanishes is nothing beside it."""
    leaves = jax.tree.leaves(kept, is_leaf=_is_kept)
    rows = leaves[0].inputs.shape[1] if _is_kept(leaves[0]) else leaves[0].shape[0]
    squares = jnp.zeros((rows, parts[0]), jnp.float32)
    for part, leaf in zip(jax.tree.leaves(parts[1]), leaves, strict=True):
        by_layer = isinstance(part, slice)
        if _is_kept(leaf):
            by_row = per_row.kept_squares(leaf, clip_norm).T
            by_row = by_row if by_layer else by_row.sum(1)
        else:
            by_row = per_row.square_sum(per_row.wide(leaf) / clip_norm, 1 + by_layer)
        squares = squares.at[:, part].add(by_row)
    terms = 8 + sum(leaf.inputs.shape[0] if _is_kept(leaf) else 1 for leaf in leaves)
    return squares * (1 + terms * per_row.ROUNDOFF)  # what adding up here, and factors, may round away


def _is_kept(leaf):
    return isinstance(leaf, per_row.Kept)


def _factors(squares, clip_norm, weights, mode):
    """What each part [B, m] of a row's gradient is multiplied by, and the row's reported norm [B], from squared norms [B, m] in
    units of clip_norm^2."""
    norms = clip_norm * jnp.sqrt(squares.sum(1))
    if mode == "automatic":
        factors = clip_norm / (norms[:, None] + STABILITY)
    else:  # of m parts each has clip_norm / sqrt(m)
        factors = 1 / jnp.maximum(jnp.sqrt(squares * squares.shape[1]), 1)
    finite, counted = jnp.isfinite(norms), weights > 0
    factors = jnp.where((finite & counted)[:, None], weights[:, None] * factors, 0)
    return factors, jnp.where(counted, jnp.where(finite, norms, jnp.inf), 0)


def _weighted_sum(factors, g):
    """sum_i factors_i g_i float32 for factors [B], or [B, L] over a stacked leaf; a factor of 0 silences whatever the row holds
    (0 * nan is nan). It is not rounded to the leaf's own dtype: that would move it by more than a row's share."""
    if _is_kept(g):
        return per_row.kept_sum(factors, g)
    over = factors.reshape(*factors.shape, *[1] * (g.ndim - factors.ndim))
    g = jnp.where(over > 0, per_row.wide(g), 0)
    if factors.ndim == 1:
        return jnp.tensordot(factors, g, 1, precision=per_row.EXACT)
    return jnp.einsum("bl,bl...->l...", factors, g, precision=per_row.EXACT)


def _sums_by_owner(owner, count, factors, g):
    """`_weighted_sum` of each owner's rows -> [count, ...]."""
    owner_rows = jax.nn.one_hot(owner, count, axis=0)
    return jnp.tensordot(owner_rows, _scaled(factors, g), 1, precision=per_row.EXACT)


def _scaled(factors, g):
    """Rows g [B, ...] times their factors, [B] or [B, L] over a stacked leaf; one of factor 0 becomes 0, whatever it holds."""
    over = factors.reshape(*factors.shape, *[1] * (g.ndim - factors.ndim))
    return over * jnp.where(over > 0, per_row.wide(g), 0)


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
