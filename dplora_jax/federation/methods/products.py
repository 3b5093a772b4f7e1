"""What methods share that average products B A in place of factors."""


def head_and_product(client, start, done):
    """The change of a client's head, and its own product."""
    import jax
    import jax.numpy as jnp

    from dplora_jax.federation import exact

    ended = jax.tree.map(jnp.add, done.began, done.upload)
    return {part: value for part, value in done.upload.items() if part != "layers"}, exact.product(ended)


def zero_residual(adapter):
    """Nothing is folded into the base before round 1."""
    from dplora_jax.federation import exact

    return exact.zeros(adapter)


def shifted(model, params, residual):
    """The base with the residual."""
    from dplora_jax import lora

    return lora.shifted(model, params, residual)


def folded_transfers(rest):
    """`Method.transfers` of a method that folds into the base: down travel all clients' factors, or the dense residual and the
    means of `rest(whole)`, whichever is less; the latter, where a client may have missed rounds."""

    def transfers(whole, adapters, bits, may_miss):
        import jax

        from dplora_jax.federation import compression, exact

        each = [compression.size(tree) for tree in adapters]
        stack = sum(each) - compression.size(head(whole)) * (len(each) - 1)  # all clients' factors, and one head
        dense = compression.size(jax.eval_shape(exact.product, whole)) + compression.size(rest(whole))
        down = dense if may_miss else min(stack, dense)
        return [compression.size(tree, bits) for tree in adapters], [down] * len(adapters)

    return transfers


def head(adapter):
    """An adapter without its LoRA matrices."""
    return {part: value for part, value in adapter.items() if part != "layers"}
