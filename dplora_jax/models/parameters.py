"""A checkpoint's tensors, one by one, into the stacked layout of a model's parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from dplora_jax.errors import InputError
from dplora_jax.models import quantized

CHUNK_BYTES = 64 << 20  # of a tensor, read at a time


def read_params(model, checkpoint, quantize=None):
    """Fill `model`'s parameters from `checkpoint`, each tensor straight into its place of the stacked layout, in pieces: the
    host never holds more than the parameters and one piece."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    _check_shapes(model, checkpoint, shapes)
    small = {("layers", *t.path) for t in model.targets.values() if t.layered} if quantize else ()
    params = {}
    for weight in model.weights():
        shape = _at(shapes, weight.path)
        names = [weight.tensor.format(weight.first + i) for i in range(shape.shape[0])] if "{}" in weight.name else None
        if weight.optional and not checkpoint.has(weight.tensor):
            value = jnp.zeros(shape.shape, shape.dtype)
        elif weight.path in small:
            rows = (_read_one(checkpoint, weight, name, shape) for name in names)
            value = quantized.quantize_layers(rows, len(names), quantize)
        else:
            host = _aligned_empty(shape.shape, shape.dtype)
            for row, name in zip(host if names else host[None], names or [weight.tensor], strict=True):
                _read_into(row, checkpoint, weight, name)
            value = jax.device_put(host)  # on a CPU this shares the memory
        _put(params, weight.path, value)
    return params


def _check_shapes(model, checkpoint, shapes):
    """Raise InputError where a tensor is missing or misshapen. No memory is taken for what config.json alone says is there, and
    the first layer that lacks ends the search, however many there are said to be."""
    for weight in model.weights():
        shape = _at(shapes, weight.path).shape
        layers, shape = (shape[0], shape[1:]) if "{}" in weight.name else (1, shape)
        if weight.optional and not checkpoint.has(weight.tensor):
            continue
        expected = shape[::-1] if weight.part == "kernel" else shape
        for name in map(weight.tensor.format, range(weight.first, weight.first + layers)):
            if checkpoint.shape(name) != expected:
                hint = " (num_labels differs from the checkpoint's)" if weight.path[0] == "head" else ""
                raise InputError(
                    f"{checkpoint.directory}: tensor {name} has shape {checkpoint.shape(name)}, expected {expected}{hint}."
                )


def _read_one(checkpoint, weight, name, shape):
    """One layer's matrix, as a numpy array of its own."""
    row = np.empty(shape.shape[1:], shape.dtype)
    _read_into(row, checkpoint, weight, name)
    return row


def _read_into(row, checkpoint, weight, name):
    """Read tensor `name` into `row`, CHUNK_BYTES at a time, turned round where it is stored transposed."""
    transposed, shape = weight.part == "kernel", checkpoint.shape(name)
    step = max(1, CHUNK_BYTES // max(1, 4 * row.size // shape[0]))
    for start in range(0, shape[0], step):
        piece = slice(start, min(start + step, shape[0]))
        if transposed:
            row[:, piece] = checkpoint.read(name, piece).T
        else:
            row[piece] = checkpoint.read(name, piece)


def _aligned_empty(shape, dtype):
    """An uninitialised array whose memory JAX's CPU backend can take over as it is: it asks for 64-byte alignment."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def _put(tree, path, value):
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
