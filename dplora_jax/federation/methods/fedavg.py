"""FedAvg: the mean of A and of B apart, as DP-LoRA does (Liu et al. 2023, algorithm 1; McMahan et al. 2017).

With A frozen (`lora.freeze_a`) the same is FFA-LoRA (Sun et al. 2024), whose mean is exact.
"""

import dataclasses

from dplora_jax.federation.methods.method import Method


def padded(method, rank):
    """FedAvg of adapters of several ranks, those of rank r < R = `rank` filled up with zeros: each component's mean is over the
    clients that train it (zero-padding, Cho et al. 2024, section 3; without their sparsity weights)."""
    import jax.numpy as jnp

    def terms(client, start, done):
        return done.upload, (jnp.arange(rank) < client.rank).astype(jnp.float32)

    def settle(mean, adapter, residual, number):
        upload, share = mean
        share = jnp.where(share > 0, share, 1)
        pairs = {
            name: pair.replace(a=pair.a / share[:, None], b=pair.b / share) for name, pair in upload["layers"].items()
        }
        return {**upload, "layers": pairs}, residual

    return dataclasses.replace(method, terms=terms, settle=settle)


METHOD = Method("fedavg", "FedAvg of A and B, weighted by n_k / n", ranked=padded)
