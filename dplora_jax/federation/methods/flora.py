"""FLoRA: the clients' adapters stacked into one of rank K R, whose product is the mean product exactly; it is folded into the
base, and the next round begins with a fresh A and B = 0 (Wang et al. 2024, section 3 and algorithm 1). Any ranks stack."""

from dplora_jax.federation.methods import products
from dplora_jax.federation.methods.method import FACTORS, FOLDED, MEAN_PRODUCT, Method


def _settle(mean, adapter, residual, number):
    import jax
    import jax.numpy as jnp

    upload, product = mean
    key = jax.random.fold_in(jax.random.key(0), number)  # public, as the start of the first round is

    def anew(index, pair):
        bound = pair.a.shape[-1] ** -0.5
        a = jax.random.uniform(jax.random.fold_in(key, index), pair.a.shape, jnp.float32, -bound, bound)
        return pair.replace(a=a - pair.a, b=-pair.b)

    pairs = adapter["layers"]
    upload = {**upload, "layers": {name: anew(index, pairs[name]) for index, name in enumerate(sorted(pairs))}}
    return upload, jax.tree.map(jnp.add, residual, product)


METHOD = Method(
    "flora",
    "the clients' stacked adapters folded into the base after each round (FLoRA)",
    refuses=FACTORS + FOLDED + MEAN_PRODUCT,
    settled=True,
    residual=products.zero_residual,
    shift=products.shifted,
    terms=products.head_and_product,
    settle=_settle,
    transfers=products.folded_transfers(products.head),
)
