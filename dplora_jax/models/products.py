"""Products with frozen matrices that are held in a narrower number type than what flows between them.

`dtype="mixed"` holds weights in bfloat16. Embeddings are added up in it; what flows from the first layer on is float32. On a CPU
that multiplies bfloat16, and on every other kind of device, both factors of a product with a weight are bfloat16 and their
products are added up in float32. Any other CPU widens the weight, since a narrow product would take longer there.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp

MIXED = "mixed"
CPU_FEATURES = {"avx512_bf16", "amx_bf16"}  # as Linux names them


def types(dtype):
    """(dtype of the weights, dtype of what flows between them) of a number type, or of "mixed"."""
    if isinstance(dtype, str) and dtype == MIXED:
        return jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    return jnp.dtype(dtype), jnp.dtype(dtype)


def matmul(x, kernel):
    """x [..., I] times a frozen kernel [I, O] -> [..., O], in x's dtype; a kernel that is not the narrower is cast to it."""
    if kernel.dtype.itemsize >= x.dtype.itemsize:
        return x @ kernel.astype(x.dtype)
    return _mixed(x, kernel)


def einsum(letters, x, weight):
    """`jnp.einsum` of x and a frozen weight, added up in float32 -> float32; a weight that is not the narrower is cast to x's
    dtype."""
    if weight.dtype.itemsize >= x.dtype.itemsize:
        return jnp.einsum(letters, x, weight.astype(x.dtype), preferred_element_type=jnp.float32)

    def narrow(x, weight):
        return jnp.einsum(letters, x.astype(weight.dtype), weight, preferred_element_type=jnp.float32)

    def wide(x, weight):
        return jnp.einsum(letters, x, weight.astype(x.dtype))

    if cpu_multiplies_bfloat16():
        return narrow(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=wide, default=narrow)


@jax.custom_vjp
def _mixed(x, kernel):
    return einsum("...i,io->...o", x, kernel)


def _forward(x, kernel):
    return _mixed(x, kernel), (x, kernel)


def _backward(residuals, g):
    # Left to itself, JAX would multiply the cotangent with the kernel widened.
    x, kernel = residuals
    grad_kernel = jnp.einsum("...i,...o->io", x, g).astype(kernel.dtype)  # nobody asks for it, and it is not computed
    return _mixed(g, kernel.T), grad_kernel


_mixed.defvjp(_forward, _backward)


@functools.cache
def cpu_multiplies_bfloat16():
    """Whether this machine's CPU has products of bfloat16, as far as Linux tells."""
    try:
        words = pathlib.Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not CPU_FEATURES.isdisjoint(words)
