"""Frozen kernels in 8 or 4 bits, for bases too large to hold in floating point while adapters train (QLoRA, Dettmers 2023).

Letters: L layers, I inputs, O outputs, G groups of inputs that share a scale.

"int8" is symmetric with one scale for each output; "nf4" is 4-bit NormalFloat with one scale for each output and group of at
most 64 inputs, two values in a byte. A quantised kernel is a pytree node in its kernel's place: adapters, and the gradients
of single rows, never see it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

KINDS = ("int8", "nf4")
GROUP = 64  # inputs that share a scale in nf4, at most (QLoRA, section 3)
# Quantiles of the normal distribution, scaled to [-1, 1], that hold 0 and both ends exactly (QLoRA, appendix E).
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


@struct.dataclass
class Quantized:
    """A kernel [..., I, O] in few bits; every leaf keeps the kernel's leading axes, so that layers are sliced and scanned.

    int8: `codes` int8 [..., I, O] in -127..127, `scale` float32 [..., O]. nf4: `codes` uint8 [..., G, g / 2, O], whose low
    halves index `NF4` for the first g / 2 inputs of a group and high halves for the rest; `scale` bfloat16 [..., G, O].
    """

    codes: Any
    scale: Any
    kind: str = struct.field(pytree_node=False)
    inputs: int = struct.field(pytree_node=False)


def is_quantized(x):
    """Whether `x` is a quantised kernel."""
    return isinstance(x, Quantized)


def nbytes(tree):
    """The bytes that the leaves of `tree` take: arrays, quantised kernels, or the shapes that `jax.eval_shape` gives."""
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def quantize(params, model, kind, donate=False):
    """`params` with the kernel [L, I, O] of every layer's matrices in `model.targets` replaced by a `Quantized` one of `kind`.

    The rest (embeddings, norms, pooler, head) is untouched. Kernels are converted one layer at a time; with `donate`, each
    source is deleted once converted, so that `params` must not be used again. Raises ValueError on an unknown kind.
    """
    layers = params["layers"]
    for path in sorted({target.path for target in model.targets.values() if target.layered}):
        layers = _replace_at(layers, path, lambda kernel: _convert(kernel, kind, donate))
    return {**params, "layers": layers}


def _convert(kernel, kind, donate):
    quantized = jax.block_until_ready(quantize_kernel(kernel, kind))
    if donate and isinstance(kernel, jax.Array):
        kernel.delete()
    return quantized


def _replace_at(tree, path, convert):
    if not path:
        return convert(tree)
    return {**tree, path[0]: _replace_at(tree[path[0]], path[1:], convert)}


def quantize_kernel(kernel, kind):
    """A float kernel [I, O] or [L, I, O], of numpy or JAX, as a `Quantized` one on the default device.

    Of a stacked kernel one layer at a time is moved there. Raises ValueError on an unknown kind or another rank.
    """
    if kernel.ndim == 2:
        return _encode_jit(kernel, kind)
    if kernel.ndim != 3:
        raise ValueError(f"a kernel to quantise must be [I, O] or [L, I, O], not {kernel.shape}.")
    return quantize_layers((kernel[i] for i in range(kernel.shape[0])), kernel.shape[0], kind)


def quantize_layers(layers, depth, kind):
    """The `depth` kernels [I, O] that `layers` yields, each quantised as it comes, as one `Quantized` [depth, I, O].

    For a checkpoint's tensors, none of which need be held beside the next. Raises ValueError where their number differs.
    """
    stack, count = None, 0
    for count, layer in enumerate(layers, 1):
        if stack is None:
            shapes = jax.eval_shape(functools.partial(_encode, kind=kind), layer)
            stack = jax.tree.map(lambda s: jnp.zeros((depth, *s.shape), s.dtype), shapes)
        stack = _put(stack, layer, count - 1)
    if count != depth:
        raise ValueError(f"{count} layers came where {depth} were announced.")
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack, layer, index):
    return jax.tree.map(lambda s, new: s.at[index].set(new), stack, _encode(layer, stack.kind))


def _encode(kernel_IxO, kind):
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of quantisation; known: {', '.join(KINDS)}.")
    kernel = jnp.asarray(kernel_IxO, jnp.float32)
    inputs, outputs = kernel.shape
    if kind == "int8":
        scale = jnp.abs(kernel).max(0) / 127
        return Quantized(jnp.round(_ratio(kernel, scale)).astype(jnp.int8), scale, kind, inputs)
    groups = -(-inputs // GROUP)
    half = -(-inputs // (2 * groups))
    kernel = jnp.pad(kernel, ((0, 2 * half * groups - inputs), (0, 0))).reshape(groups, 2, half, outputs)
    scale = jnp.abs(kernel).max((1, 2)).astype(jnp.bfloat16)
    ratio = _ratio(kernel, scale[:, None, None].astype(jnp.float32))
    # Counting the midpoints below finds the nearest value with no array of distances to all sixteen.
    codes = sum((ratio > middle).astype(jnp.uint8) for middle in (NF4[1:] + NF4[:-1]) / 2)
    return Quantized(codes[:, 0] | codes[:, 1] << 4, scale, kind, inputs)


_encode_jit = functools.partial(jax.jit, static_argnums=1)(_encode)


def _ratio(x, scale):
    """x / scale, and 0 where all that share a scale are 0."""
    return x / jnp.where(scale == 0, 1, scale)


def dequantize(kernel, dtype=jnp.float32):
    """The kernel [..., I, O] that `kernel` stands for, in `dtype`."""
    scale = kernel.scale.astype(jnp.float32)
    if kernel.kind == "int8":
        return (kernel.codes * scale[..., None, :]).astype(dtype)
    codes = jnp.stack([kernel.codes & 15, kernel.codes >> 4], -3)
    values = (jnp.asarray(NF4)[codes] * scale[..., None, None, :]).astype(dtype)
    return values.reshape(*values.shape[:-4], -1, values.shape[-1])[..., : kernel.inputs, :]


@jax.custom_vjp
def matmul(x, kernel):
    """x [..., I] times a `Quantized` kernel [I, O] -> [..., O], in x's dtype; its gradient flows to x alone.

    The backward pass keeps the few bits and expands them again, so that a scan over layers holds the float matrix of one
    layer at a time. Layers that are unrolled give no such promise: a compiler may expand them all at once.
    """
    return _product(x, kernel, lambda w: w)


def _product(x, kernel, turn):
    # Without the barrier a compiler may lift the float matrix out of the loop over steps, or share it between both passes.
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    return x @ turn(dequantize(kernel, x.dtype))


def _forward(x, kernel):
    return matmul(x, kernel), kernel


def _backward(kernel, g):
    return _product(g, kernel, jnp.transpose), None


matmul.defvjp(_forward, _backward)
