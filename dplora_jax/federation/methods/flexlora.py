"""FlexLoRA: the mean product, factored anew to the largest rank; a client of rank r starts from its first r components (Bai et
al. 2024, section 3)."""

from dplora_jax.federation.methods import products
from dplora_jax.federation.methods.method import FACTORS, MEAN_PRODUCT, Method


def _settle(mean, adapter, residual, number):
    import jax
    import jax.numpy as jnp

    from dplora_jax.federation import exact

    upload, product = mean
    pairs = adapter["layers"]
    rank = next(iter(pairs.values())).a.shape[1]
    best = exact.factors(product, rank, {name: pair.scale for name, pair in pairs.items()})
    return {**upload, "layers": jax.tree.map(jnp.subtract, best, pairs)}, residual


METHOD = Method(
    "flexlora",
    "the mean product factored anew by singular values (FlexLoRA)",
    refuses=FACTORS + MEAN_PRODUCT,
    settled=True,
    terms=products.head_and_product,
    settle=_settle,
)
