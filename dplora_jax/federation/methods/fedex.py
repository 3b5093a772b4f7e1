"""FedEx-LoRA: FedAvg's factors, and what their product misses of the mean product folded into the base: W + mean(B_k A_k) exactly
(Singhal et al. 2024, equations 6 to 8)."""

from dplora_jax.federation.methods import products
from dplora_jax.federation.methods.method import FACTORS, FOLDED, MEAN_PRODUCT, Method


def _terms(client, start, done):
    return done.upload, products.head_and_product(client, start, done)[1]


def _settle(mean, adapter, residual, number):
    import jax
    import jax.numpy as jnp

    from dplora_jax.federation import exact

    upload, product = mean
    new = jax.tree.map(jnp.add, adapter, upload)
    return upload, jax.tree.map(lambda r, p, n: r + p - n, residual, product, exact.product(new))


METHOD = Method(
    "fedex",
    "FedAvg of A and B, and what their product misses of the mean product folded into the base (FedEx-LoRA)",
    refuses=FACTORS + FOLDED + MEAN_PRODUCT,
    settled=True,
    residual=products.zero_residual,
    shift=products.shifted,
    terms=_terms,
    settle=_settle,
    transfers=products.folded_transfers(lambda whole: whole),
)
