"""RoLoRA: B alone in odd rounds, A alone in even ones, so that every mean is exact and both are trained (Chen et al. 2024,
algorithm 1)."""

from dplora_jax.federation.methods.method import FACTORS, ONE_RANK, Method

FROZEN = "a", "b"  # in rounds 1, 2, and so on


def _train(run, number):
    """The half whose turn it is: the other is a constant of the round, and no leaf of what is clipped and noised."""
    import jax

    from dplora_jax import lora

    whole = jax.eval_shape(lambda: run(lambda params, adapter: (params, adapter)))

    def half(letter):
        return lambda: filled(run(lambda params, adapter: lora.freeze(params, adapter, letter)), whole)

    return jax.lax.switch(number % len(FROZEN), [half(letter) for letter in FROZEN])


def filled(tree, whole):
    """A tree like `whole` (of shapes): the leaves of `tree` where it has them, zeros elsewhere."""
    import jax
    import jax.numpy as jnp

    by_path = dict(jax.tree.leaves_with_path(tree))
    return jax.tree.map_with_path(
        lambda path, x: by_path[path] if path in by_path else jnp.zeros(x.shape, x.dtype), whole
    )


def _halves(whole, adapters, bits, may_miss):
    """Means over the two halves' rounds."""
    from dplora_jax import lora
    from dplora_jax.federation import compression

    halves = [[lora.freeze({}, tree, letter)[1] for letter in FROZEN] for tree in adapters]
    up = [sum(compression.size(half, bits) for half in pair) / 2 for pair in halves]
    return up, [sum(map(compression.size, pair)) / 2 for pair in halves]


METHOD = Method(
    "rolora",
    "B and A trained in turn, each with an exact mean weighted by n_k / n (RoLoRA)",
    refuses=FACTORS + ONE_RANK,
    settled=True,  # a memory would move the half that is not trained in its rounds
    train=_train,
    transfers=_halves,
)
