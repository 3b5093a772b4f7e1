"""Each row's own gradient of a weight, out of one batched backward pass.

Letters: B rows, T tokens, L layers, I inputs, O outputs. Where several rows of tokens are one record (`losses.UnitLoss`), a row
here is all of theirs: B records of T tokens in all.
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
LONG = 1 << 14  # numbers of an axis, from which it is summed in pieces
LARGEST = 126  # 2^126 and 2^-126 are normal float32 numbers, which no backend flushes to zero


@struct.dataclass
class PerRow:
    """A weight [O, I] that all rows share, with a slot whose cotangent tells of each row's gradient alone. No forward pass
    reads a slot. What passes through the weight may have G times as many rows: G at a time then share a slot, in their order.
    There are two kinds:

    - zeros [B, O, I] receive each row's gradient;
    - `Kept` receives the inputs and cotangents that each row's gradient is the product of (book-keeping, Bu et al. 2023, section
      3.2): its norm (the ghost norm, Goodfellow 2015; Li et al. 2022) and any weighted sum of rows' gradients come of these.
    """

    weight: Any
    slot: Any


@struct.dataclass
class Kept:
    """The inputs [B, T, I] and the outputs' cotangents [B, T, O] that a row's gradient is the product of, in the dtype of the
    activations; each [L, ...] where a weight is stacked over layers."""

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
    # Of a slot that is only written, its kind and its rows are all that the backward pass needs.
    return _per_row_linear(x, weight, slot), (x, weight, jax.tree.map(lambda array: array[..., :0], slot))


def _backward(residuals, g):
    x, weight, slot = residuals
    grad_x = _of_tokens(g, weight.astype(x.dtype))
    grad_weight = jnp.einsum("bto,bti->oi", g, x).astype(weight.dtype)  # nobody asks for it, and it is not computed
    x, g = (y.reshape(jax.tree.leaves(slot)[0].shape[0], -1, y.shape[-1]) for y in (x, g))
    if isinstance(slot, Kept):
        return grad_x, grad_weight, Kept(x, g)
    per_row = jnp.einsum("bto,bti->boi", g, x, preferred_element_type=jnp.float32, precision=EXACT)
    return grad_x, grad_weight, per_row


_per_row_linear.defvjp(_forward, _backward)


def wide(y):
    """`y` as float32: the very numbers of its own dtype. The rounding to that dtype is said again, since XLA may leave it out
    where a narrow number is widened at once (`--xla_allow_excess_precision`): one reader would see more digits than another."""
    kind = jnp.finfo(y.dtype)
    return y if kind.bits >= 32 else jax.lax.reduce_precision(y.astype(jnp.float32), kind.nexp, kind.nmant)


def square_sum(y, axes=1):
    """Sum of squares of `y` float32 over all but its first `axes` axes, never too small: [B, ...] -> [B], or more axes.

    n numbers add up to within n ROUNDOFF, in any order (Higham 2002, section 3.1). One axis is summed after the other, a long one
    in pieces, so that n is a sum of sizes and not their product; and what rounding may have taken is added.
    """
    y, terms = jnp.square(y), 2
    while y.ndim > axes:
        size = y.shape[-1]
        if size > LONG:
            y = jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, -size % PIECE)]).reshape(*y.shape[:-1], -1, PIECE)
        terms += y.shape[-1]
        y = jax.lax.optimization_barrier(y.sum(-1))
    return y * (1 + terms * ROUNDOFF * SLACK)


def squared_norm(g, x, unit=1.0):
    """|sum_t g_t x_t^T|^2 / unit^2 of each row, by whichever of the product and the Gram matrices is smaller: g [B, T, O] and x
    [B, T, I] float32 -> [B], never too small. It is infinite, or nan, where a number is.

    Tokens that cancel leave rounding errors in the measure of what cancelled, not of what is left: a record made to cancel could
    pass uncut. So the errors are bounded, by n terms' (n ROUNDOFF of the sum of their sizes, in any order: Higham 2002, section
    3.1), and may only add to a norm: those of the norm, and those of the sum that it bounds.

    Every factor is scaled by a power of two, and the row by what its longest token comes to, so that no square leaves float32
    however small the one factor and large the other. What still vanishes are tokens 2^60 times shorter than the longest, far
    less than the rounding that is added, and norms below 1e-19 units.
    """
    (_, tokens, outputs), inputs = g.shape, x.shape[-1]
    g, x, exponent = _scaled(g, x)
    lengths = jnp.sqrt(jnp.square(g).sum(-1) * jnp.square(x).sum(-1)).sum(1) * SLACK
    sum_error = 2 * tokens * ROUNDOFF * lengths
    if outputs * inputs <= tokens * (outputs + inputs):
        squares = square_sum(jnp.einsum("bto,bti->boi", g, x, precision=EXACT))
    else:
        (gram_g, terms_g), (gram_x, terms_x) = _gram(g), _gram(x)
        squares = jax.lax.optimization_barrier(jnp.einsum("bts,bts->bt", gram_g, gram_x, precision=EXACT)).sum(1)
        error = (terms_g + terms_x + 2 * tokens) * ROUNDOFF * jnp.square(lengths)
        squares = jnp.maximum(squares, 0) + error
    return jnp.square(_times_power(jnp.sqrt(squares) + sum_error, exponent, unit))


def _scaled(g, x):
    """g [B, T, O] and x [B, T, I] with every token's largest number between 1 and 2, the tokens of g then by their share of their
    row's longest; and the exponents [B] int32 of what this divided the rows' products by."""
    (g, g_exponent), (x, x_exponent) = _normalised(g), _normalised(x)
    exponents = g_exponent + x_exponent
    largest = exponents.max(1)
    return g * _power(exponents - largest[:, None])[..., None], x, largest


def _normalised(y):
    """y [B, T, I] with each token divided by the power of two below its largest number -> (y, exponents [B, T] int32; of a token
    of nothing but zeros, the least)."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(y).max(-1), jnp.int32)  # nan and inf have the largest exponent there is
    exponents = jnp.where(bits == 0, -2 * LARGEST, jnp.clip((bits >> 23) - 127, -LARGEST, LARGEST))
    return y * _power(-exponents)[..., None], exponents


def _power(exponent):
    """2^exponent float32, exactly; 0 below 2^-126, and 2^126 above."""
    exponent = jnp.minimum(exponent, LARGEST)
    bits = jnp.where(exponent < -LARGEST, 0, (exponent + 127) << 23)
    return jax.lax.bitcast_convert_type(bits.astype(jnp.int32), jnp.float32)


def _times_power(y, exponent, unit=1.0):
    """y 2^exponent / unit, where only the result need lie within float32."""
    bits = jax.lax.bitcast_convert_type(jnp.asarray(unit, jnp.float32), jnp.int32)
    unit_exponent = jnp.clip((bits >> 23) - 127, -LARGEST, LARGEST)
    exponent = exponent - unit_exponent
    half = jnp.clip(exponent, -LARGEST, LARGEST)
    return y / (unit * _power(-unit_exponent)) * _power(half) * _power(exponent - half)


def _gram(y):
    """y y^T of each row, y [B, T, I] -> ([B, T, T], how many terms are ever added one to another): PIECE inputs at a time, so
    that rounding grows with these and with how many pieces there are, not with the inputs."""
    inputs = y.shape[-1]
    pieces = [y[..., first : first + PIECE] for first in range(0, inputs, PIECE)]
    products = [jnp.einsum("bti,bsi->bts", piece, piece, precision=EXACT) for piece in pieces]
    return sum(products[1:], products[0]), min(inputs, PIECE) + len(pieces)


def kept_squares(kept, unit=1.0):
    """Each row's squared norm in each layer, from what was kept of a weight stacked over layers -> [L, B] float32, in units of
    unit^2, never too small."""
    return jax.lax.map(lambda layer: squared_norm(wide(layer.cotangents), wide(layer.inputs), unit), kept)


def kept_sum(factors, kept):
    """sum_b factors_b times row b's gradient, from what was kept of a weight stacked over layers: `factors` [B] or [B, L] ->
    [L, O, I] float32, a layer at a time."""
    layers, rows = kept.inputs.shape[:2]
    factors = factors.T if factors.ndim > 1 else jnp.broadcast_to(factors, (layers, rows))
    return jax.lax.map(
        lambda layer: _product(layer[0], wide(layer[1].cotangents), wide(layer[1].inputs)), (factors, kept)
    )


def _product(factors, g, x):
    """sum_b factors_b g_b^T x_b -> [O, I] float32. A factor of 0 silences whatever the row holds (0 * nan is nan). Tokens are
    scaled as for the norm: were one factor of a token flushed to zero and another's not, they would no longer cancel.

    A row's tokens are summed first, and only then added to other rows. In one sum over all tokens of all rows, what a row's
    tokens come to before they cancel, 2^24 / 4 T clip norms at most, would swallow the other rows' shares.
    """
    g, x = (jnp.where(factors[:, None, None] > 0, y, 0) for y in (g, x))
    g, x, exponent = _scaled(g, x)

    def add(total, row):
        factor, g, x = row
        return total + jnp.einsum("to,ti->oi", factor * g, x, precision=EXACT), None

    total = jnp.zeros((g.shape[-1], x.shape[-1]), jnp.float32)
    return jax.lax.scan(add, total, (_times_power(factors, exponent), g, x))[0]


def with_slots(adapter, slots):
    """`adapter` with each leaf a `PerRow`: `slots` is a tree like it of zeros [B, *leaf.shape] or, for a leaf stacked over
    layers, of `Kept` zeros."""

    def under_layers(leaf, slot):
        return PerRow(leaf, slot if isinstance(slot, Kept) else jnp.moveaxis(slot, 0, 1))

    return {
        part: jax.tree.map(under_layers if part == "layers" else PerRow, adapter[part], slots[part]) for part in adapter
    }


def keeps_less(tokens, outputs, inputs, dtype):
    """Whether what is `Kept` of a row's gradient [outputs, inputs] takes less memory than the gradient itself. It is then also
    the faster way, by all that was measured: moving the larger of the two is what costs (docs/results/speed.md)."""
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
        return Kept(*(jnp.zeros((layers, rows, tokens, size), dtype) for size in (inputs, outputs)))

    return {part: jax.tree.map(under_layers if part == "layers" else whole, adapter[part]) for part in adapter}
