"""Each row's own gradient of a weight, out of one batched backward pass.

Letters: B rows, T tokens, L layers, I inputs, O outputs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

# Accelerators round float32 products by default; norms and the sums that they bound must not be rounded differently.
EXACT = jax.lax.Precision.HIGHEST
ROUNDOFF = 2.0**-24  # of float32
SLACK = 1 + 2.0**-8  # for the rounding of what bounds the rounding
PIECE = 512


@struct.dataclass
class PerRow:
    """A weight [O, I] that all rows share, with a slot whose cotangent tells of each row's gradient alone. No forward pass
    reads a slot. There are three kinds:

    - zeros [B, O, I] receive each row's gradient;
    - `Kept` receives each row's squared norm, and what any weighted sum of the rows' gradients can be made of (book-keeping, Bu
      et al. 2023, section 3.2);
    - factors [B] receive each row's squared norm (the ghost norm, Goodfellow 2015; Li et al. 2022), and the weight's own
      cotangent is the sum of the rows' gradients times these factors.

    Only the first kind ever forms a row's gradient, or, of the others, those whose rows are short, one layer at a time.
    """

    weight: Any
    slot: Any


@struct.dataclass
class Kept:
    """Each row's squared gradient norm [B] float32, and the inputs [B, T, I] and the outputs' cotangents [B, T, O] that the
    gradient is the product of, in the dtype of the activations; each [L, ...] where a weight is stacked over layers."""

    squares: Any
    inputs: Any
    cotangents: Any


def linear(x, weight):
    """x [B, T, I] times weight [O, I] transposed -> [B, T, O], in x's dtype; a `PerRow` weight also feeds its slot."""
    if isinstance(weight, PerRow):
        return _per_row_linear(x, weight.weight, weight.slot)
    return _of_tokens(x, weight.astype(x.dtype).T)


def _of_tokens(x, matrix):
    """x [B, T, I] times matrix [I, O] -> [B, T, O], rows and tokens as one axis: the weight's gradient is then a plain product of
    two matrices, with which a CPU is done in a fraction of the time of one over two axes."""
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], matrix.shape[-1])


@jax.custom_vjp
def _per_row_linear(x, weight, slot):
    # The cast lies inside, so that the sum over rows keeps the weight's precision: rounded to bfloat16, it would move by
    # more than one row's share when one row changes.
    return _of_tokens(x, weight.astype(x.dtype).T)


def _forward(x, weight, slot):
    # Of a slot that is only written, its kind is all that the backward pass needs.
    factors = not isinstance(slot, Kept) and slot.ndim == 1
    return _per_row_linear(x, weight, slot), (x, weight, slot if factors else jax.tree.map(lambda _: None, slot))


def _backward(residuals, g):
    x, weight, slot = residuals
    grad_x = _of_tokens(g, weight.astype(x.dtype))
    wide_g, wide_x = g.astype(jnp.float32), x.astype(jnp.float32)
    if slot is None or isinstance(slot, Kept):
        grad_weight = jnp.einsum("bto,bti->oi", g, x).astype(weight.dtype)  # nobody asks for it, and it is not computed
        if slot is not None:
            return grad_x, grad_weight, Kept(squared_norm(wide_g, wide_x), x, g)
        per_row = jnp.einsum("bto,bti->boi", g, x, preferred_element_type=jnp.float32, precision=EXACT)
        return grad_x, grad_weight, per_row
    # The factor meets float32 gradients, the very ones whose norm was taken: scaled earlier, in the loss, they would be
    # rounded anew in bfloat16 and pass the norm that they were cut to.
    return grad_x, _product(slot, wide_g, wide_x).astype(weight.dtype), squared_norm(wide_g, wide_x)


_per_row_linear.defvjp(_forward, _backward)


def _product(factors, g, x):
    """sum_b factors_b g_b^T x_b -> [O, I] float32. A factor of 0 silences whatever the row holds (0 * nan is nan)."""
    over = factors[:, None, None]
    g, x = (jnp.where(over > 0, y, 0) for y in (g, x))
    g, x = (y.reshape(-1, y.shape[-1]) for y in (over * g, x))
    return jnp.einsum("ko,ki->oi", g, x, precision=EXACT)


def squared_norm(g, x):
    """|sum_t g_t x_t^T|^2 of each row, by whichever of the product and the Gram matrices is smaller: g [B, T, O] and x [B, T, I]
    float32 -> [B], never too small.

    Tokens that cancel leave rounding errors in the measure of what cancelled, not of what is left: a record made to cancel could
    pass uncut. So the errors are bounded, by n terms' (n ROUNDOFF of the sum of their sizes, in any order: Higham 2002, section
    3.1), and may only add to a norm: those of the norm, and those of the sum that it bounds.
    """
    (_, tokens, outputs), inputs = g.shape, x.shape[-1]
    lengths = jnp.sqrt(jnp.square(g).sum(-1) * jnp.square(x).sum(-1)).sum(1) * SLACK
    of_sum = 2 * tokens * ROUNDOFF * lengths
    if outputs * inputs <= tokens * (outputs + inputs):
        squares = jnp.square(jnp.einsum("bto,bti->boi", g, x, precision=EXACT)).sum((1, 2))
        return jnp.square(jnp.sqrt(squares) + of_sum)
    (gram_g, terms_g), (gram_x, terms_x) = _gram(g), _gram(x)
    squares = jnp.einsum("bts,bts->bt", gram_g, gram_x, precision=EXACT).sum(1)
    error = (terms_g + terms_x + 2 * tokens) * ROUNDOFF * jnp.square(lengths)
    return jnp.square(jnp.sqrt(jnp.maximum(squares, 0) + error) + of_sum)


def _gram(y):
    """y y^T of each row, y [B, T, I] -> ([B, T, T], how many terms are ever added one to another): PIECE inputs at a time, so
    that rounding grows with these and with how many pieces there are, not with the inputs."""
    inputs = y.shape[-1]
    pieces = [y[..., first : first + PIECE] for first in range(0, inputs, PIECE)]
    products = [jnp.einsum("bti,bsi->bts", piece, piece, precision=EXACT) for piece in pieces]
    return sum(products[1:], products[0]), min(inputs, PIECE) + len(pieces)


def kept_sum(factors, kept):
    """sum_b factors_b times row b's gradient, from what was kept of a weight stacked over layers: `factors` [B] or [B, L] ->
    [L, O, I] float32, a layer at a time."""
    layers, rows = kept.squares.shape
    factors = factors.T if factors.ndim > 1 else jnp.broadcast_to(factors, (layers, rows))

    def one(layer):
        factors, inputs, cotangents = layer
        return _product(factors, cotangents.astype(jnp.float32), inputs.astype(jnp.float32))

    return jax.lax.map(one, (factors, kept.inputs, kept.cotangents))


def with_slots(adapter, slots):
    """`adapter` with each leaf a `PerRow`: `slots` is a tree like it of zeros [B, *leaf.shape], of factors [B] (for a leaf
    stacked over layers, also [B, L]) or, for a leaf stacked over layers, of `Kept` zeros."""

    def under_layers(leaf, slot):
        if isinstance(slot, Kept):
            return PerRow(leaf, slot)
        if slot.ndim == 1:
            return PerRow(leaf, jnp.broadcast_to(slot, (leaf.shape[0], *slot.shape)))
        return PerRow(leaf, jnp.moveaxis(slot, 0, 1))

    return {
        part: jax.tree.map(under_layers if part == "layers" else PerRow, adapter[part], slots[part]) for part in adapter
    }


def keeps_less(tokens, outputs, inputs, dtype):
    """Whether what is `Kept` of a row's gradient [outputs, inputs] takes less memory than the gradient itself. It is then also
    the faster way, by all that was measured: moving the larger of the two is what costs (BUILD_NOTES.md, "Speed")."""
    return jnp.dtype(dtype).itemsize * tokens * (outputs + inputs) < 4 * outputs * inputs


def zeros(adapter, rows, kept=lambda leaf: False, tokens=None, dtype=None):
    """Slots for `with_slots` that a backward pass fills: `Kept` for the leaves [L, O, I] for which `kept(leaf)`, whose inputs are
    [rows, tokens, I] of `dtype`, and each row's gradient for the others."""

    def whole(leaf):
        return jnp.zeros((rows, *leaf.shape), jnp.float32)

    def under_layers(leaf):
        if not kept(leaf):
            return whole(leaf)
        layers, outputs, inputs = leaf.shape
        activations = (jnp.zeros((layers, rows, tokens, size), dtype) for size in (inputs, outputs))
        return Kept(jnp.zeros((layers, rows), jnp.float32), *activations)

    return {part: jax.tree.map(under_layers if part == "layers" else whole, adapter[part]) for part in adapter}
