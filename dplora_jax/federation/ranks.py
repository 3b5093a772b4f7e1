"""Clients of several LoRA ranks: each has the first components of the adapter, as many as its rank."""

from dplora_jax import lora


def cut(tree, client):
    """A tree like the adapter, cut to the rank of `client`: a client's noise stays within it, as the gradient does of an adapter
    that is cut to it (`lora.truncate`)."""
    return lora.truncate(tree, client.rank)
