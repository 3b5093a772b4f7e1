"""Ways from what clients send to the next adapter: pure functions, each with its paper.

Letters: K clients, L layers, R rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dplora_jax.federation import exact


class Method(NamedTuple):
    """`terms(client, start, upload)` is the tree that is averaged over clients, by their weights: `client` is a `Client`, `start`
    the adapter that it began with, `upload` its change. `settle(mean of terms, adapter, residual, number)` makes of it the mean
    upload and the next residual, the change {target: [L, I, O]} that is folded into the base (() where there is none); `number`
    counts the rounds before this one, and `adapter` is the global one that they led to.

    `turns` are the halves of every pair ("b", "a") that are trained in turn, a round each; () trains both in every round.
    `keeps_b`: every client keeps its B to itself, and starts from it.
    """

    terms: Callable
    settle: Callable
    turns: tuple = ()
    keeps_b: bool = False
    folds: bool = False  # whether there is a residual


# The mean of A and of B apart, as DP-LoRA does (Liu et al. 2023, algorithm 1; FedAvg, McMahan et al. 2017). With A frozen
# (`lora.freeze_a`) the same is FFA-LoRA (Sun et al. 2024), whose mean is exact.
FEDAVG = Method(
    terms=lambda client, start, upload: upload,
    settle=lambda mean, adapter, residual, number: (mean, residual),
)
# B alone in odd rounds, A alone in even ones: every mean is exact, and both are trained (RoLoRA, Chen et al. 2024, algorithm 1).
ROLORA = FEDAVG._replace(turns=("b", "a"))
# A is shared, every B stays at its client (FedSA-LoRA, Guo et al. 2024, section 4). Uploads hold A and the head.
FEDSA = FEDAVG._replace(keeps_b=True)


def _fedex(mean, adapter, residual, number):
    upload, product = mean
    new = jax.tree.map(jnp.add, adapter, upload)
    return upload, jax.tree.map(lambda r, p, n: r + p - n, residual, product, exact.product(new))


# FedAvg's factors, and what their product misses of the mean product folded into the base: W + mean(B_k A_k) exactly
# (FedEx-LoRA, Singhal et al. 2024, equations 6 to 8).
FEDEX = Method(
    terms=lambda client, start, upload: (upload, exact.product(jax.tree.map(jnp.add, start, upload))),
    settle=_fedex,
    folds=True,
)


def _products(client, start, upload):
    """The client's own product, and the change of its head."""
    ended = jax.tree.map(jnp.add, start, upload)
    return {part: value for part, value in upload.items() if part != "layers"}, exact.product(ended)


def _flora(mean, adapter, residual, number):
    upload, product = mean
    key = jax.random.fold_in(jax.random.key(0), number)  # public, as the start of the first round is

    def anew(index, pair):
        bound = pair.a.shape[-1] ** -0.5
        a = jax.random.uniform(jax.random.fold_in(key, index), pair.a.shape, jnp.float32, -bound, bound)
        return pair.replace(a=a - pair.a, b=-pair.b)

    pairs = adapter["layers"]
    upload = {**upload, "layers": {name: anew(index, pairs[name]) for index, name in enumerate(sorted(pairs))}}
    return upload, jax.tree.map(jnp.add, residual, product)


# The clients' adapters stacked into one of rank K R, whose product is the mean product exactly; it is folded into the base, and
# the next round begins with a fresh A and B = 0 (FLoRA, Wang et al. 2024, section 3 and algorithm 1). Any ranks stack.
FLORA = Method(terms=_products, settle=_flora, folds=True)


def _flexlora(mean, adapter, residual, number):
    upload, product = mean
    pairs = adapter["layers"]
    rank = next(iter(pairs.values())).a.shape[1]
    best = exact.factors(product, rank, {name: pair.scale for name, pair in pairs.items()})
    return {**upload, "layers": jax.tree.map(jnp.subtract, best, pairs)}, residual


# The mean product, factored anew to the largest rank; a client of rank r starts from its first r components (FlexLoRA, Bai et
# al. 2024, section 3).
FLEXLORA = Method(terms=_products, settle=_flexlora)


def padded(rank):
    """FedAvg of adapters of several ranks, those of rank r < R = `rank` filled up with zeros: each component's mean is over the
    clients that train it (zero-padding, Cho et al. 2024, section 3; without their sparsity weights)."""

    def terms(client, start, upload):
        return upload, (jnp.arange(rank) < client.rank).astype(jnp.float32)

    def settle(mean, adapter, residual, number):
        upload, share = mean
        share = jnp.where(share > 0, share, 1)
        pairs = {
            name: pair.replace(a=pair.a / share[:, None], b=pair.b / share) for name, pair in upload["layers"].items()
        }
        return {**upload, "layers": pairs}, residual

    return Method(terms, settle)


BY_NAME = {
    "fedavg": FEDAVG,
    "rolora": ROLORA,
    "fedsa": FEDSA,
    "fedex": FEDEX,
    "flora": FLORA,
    "flexlora": FLEXLORA,
}


def own_of(adapter):
    """What a client keeps to itself where `keeps_b`: {target: B}."""
    return {name: pair.b for name, pair in adapter["layers"].items()}


def with_own(adapter, own):
    """`adapter` with a client's own B in the place of the global one."""
    return {
        **adapter,
        "layers": {name: pair.replace(b=own[name]) for name, pair in adapter["layers"].items()},
    }


def filled(tree, whole):
    """A tree like `whole` (of shapes): the leaves of `tree` where it has them, zeros elsewhere."""
    own = dict(jax.tree.leaves_with_path(tree))
    return jax.tree.map_with_path(lambda path, x: own[path] if path in own else jnp.zeros(x.shape, x.dtype), whole)
