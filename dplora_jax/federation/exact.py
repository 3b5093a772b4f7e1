"""What adapters come to as matrices: products that average exactly, and factors of what was averaged.

The mean of B_k A_k is not the mean of B times the mean of A: what averaging factors loses (Sun et al. 2024, section 3; Singhal et
al. 2024, equation 3). Letters: L layers, I inputs, O outputs, R rank.
"""

import jax
import jax.numpy as jnp

from dplora_jax import lora


def product(adapter):
    """scale (B A)^T of every adapted matrix, in its kernel's orientation -> {target: [L, I, O] float32}."""
    return {
        name: pair.scale * jnp.einsum("lor,lri->lio", pair.b, pair.a, precision=lora.EXACT)
        for name, pair in adapter.get("layers", {}).items()
    }


def zeros(adapter):
    """A change of nothing, shaped like `product(adapter)`."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(product, adapter))


def factors(change, rank, scales):
    """The best factors of rank R = `rank` for `change` {target: [L, I, O]} -> {target: Pair} of the scales {target: float} given.

    Truncated singular value decomposition, B = U S^1/2 and A = S^1/2 V^T, largest components first, so that any first r of
    them are the best of rank r (FlexLoRA, Bai et al. 2024, section 3).
    """

    def one(scale):
        def layer(delta):
            u, s, v = jnp.linalg.svd(delta.T / scale, full_matrices=False)
            root = jnp.sqrt(s[:rank])
            short = rank - len(root)  # a rank beyond the matrix's own is filled up with zeros
            return jnp.pad(root[:, None] * v[:rank], ((0, short), (0, 0))), jnp.pad(
                u[:, :rank] * root, ((0, 0), (0, short))
            )

        return layer

    return {name: lora.Pair(*jax.lax.map(one(scales[name]), delta), scales[name]) for name, delta in change.items()}


def whole(adapter, residual, tolerance=1e-6):
    """The adapter that by itself does what `adapter` on a base shifted by `residual` does, for a file that has no place for a
    residual -> (adapter of scale 1, its rank).

    Its rank is that of the sum, counting singular values above `tolerance` of the largest: at most a matrix's own size. Works
    on host arrays; the head is kept.
    """
    sums = jax.tree.map(jnp.add, product(adapter), residual)
    values = [jnp.linalg.svd(delta, compute_uv=False) for delta in sums.values()]
    rank = max(1, *(int((s > tolerance * s.max()).sum(-1).max()) for s in values))
    return {**adapter, "layers": factors(sums, rank, dict.fromkeys(sums, 1.0))}, rank
