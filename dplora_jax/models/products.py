"""Products with frozen matrices that are held in a narrower number type than what flows between them.

`dtype="mixed"` holds weights in bfloat16 and all that flows between them in float32. Where the processor multiplies bfloat16
(AVX-512 BF16, AMX, GPUs, TPUs), such a product takes half of a float32 product's time or less; where it does not, the weights
are widened. What is added up, normed, rotated or summed over rows keeps float32 in any case.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp

MIXED = "mixed"
CPU_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}  # of Linux' names: those that XLA's CPU kernels multiply bfloat16 by


def types(dtype):
    """(dtype of the weights, dtype of what flows between them) of a number type, or of "mixed"."""
    if isinstance(dtype, str) and dtype == MIXED:
        return jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    return jnp.dtype(dtype), jnp.dtype(dtype)


def factors(x, weight):
    """Both in the number type of the narrower."""
    dtype = min(x.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
    return x.astype(dtype), weight.astype(dtype)


def matmul(x, kernel):
    """x [..., I] times a frozen kernel [I, O] -> [..., O], in x's dtype. Where the kernel is the narrower, x is rounded to its
    dtype (on a CPU without such products the kernel is widened), and what is multiplied is added up in float32."""
    if kernel.dtype.itemsize >= x.dtype.itemsize:
        return x @ kernel.astype(x.dtype)
    return _narrow_or_wide(x, kernel)


@jax.custom_vjp
def _narrow_or_wide(x, kernel):
    if cpu_multiplies_bfloat16():
        return _narrow(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=_wide, default=_narrow)


def _narrow(x, kernel):
    return jnp.matmul(*factors(x, kernel), preferred_element_type=jnp.float32).astype(x.dtype)


def _wide(x, kernel):
    return x @ kernel.astype(x.dtype)


def _forward(x, kernel):
    return _narrow_or_wide(x, kernel), (x, kernel)


def _backward(residuals, g):
    # Left to itself, JAX would multiply the cotangent with the kernel widened.
    x, kernel = residuals
    grad_kernel = jnp.einsum("...i,...o->io", x, g).astype(kernel.dtype)  # nobody asks for it, and it is not computed
    return _narrow_or_wide(g, kernel.T), grad_kernel


_narrow_or_wide.defvjp(_forward, _backward)


@functools.cache
def cpu_multiplies_bfloat16():
    """Whether this machine's CPU has products of bfloat16, as far as Linux tells."""
    try:
        words = pathlib.Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not CPU_FEATURES.isdisjoint(words)
