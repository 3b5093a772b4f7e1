"""LoRA's A from public text: the directions by which a matrix's inputs tell texts apart.

With A frozen (FFA-LoRA), a record's gradient for B is a sum of delta (A x)^T over its tokens, so A decides what of an input x is
seen. The inputs of all texts share most of their length. Under an A that is drawn at random the gradients of all records are
then nearly parallel: one direction has two thirds of their second moment, says no more than which label is common, and bounds
the learning rate. Here the rows of A are orthogonal to what public texts share, and weigh the rest alike.

EVA (Paischer et al. 2024, arXiv 2410.07170) takes A from the inputs' principal directions, LoRA-GA (Wang et al. 2024, arXiv
2407.05000) from gradients; these are a gradient's, centred and whitened, and of public text alone.

Letters: N rows of text, M outputs, P probes, L layers, I inputs, O outputs of a matrix, R rank.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dplora_jax import lora

PROBES = 2  # random directions of a matrix's outputs: of each, what moves it
CHUNK = 8  # rows at a time
FLOOR = 1e-3  # of the largest spread: directions with less count as this much


def directions(outputs, model, params, config, rows, seed=0):
    """A for each matrix that `config` (a `lora.LoraConfig`) adapts -> {target: [L, R, I] float32}.

    `outputs(params, pairs, batch)` gives [B, M] numbers that are to tell texts apart, through the `lora.Pair`s {target: Pair}, of
    a batch {name: [B, ...]}; `rows` {name: [N, ...]} are public. Each row's gradients of each output by A, under a random B that
    P columns stand for, are centred over the rows; of what is left beside the direction that all share, A's rows are the R
    largest, each divided by its spread, at the length of a fresh A's. Raises ValueError where N M P gradients are fewer than R.
    """
    probes = lora.LoraConfig(PROBES, float(PROBES), config.targets, config.last_layers)
    draws = np.random.default_rng(seed)
    pairs = {
        name: pair.replace(a=jnp.zeros_like(pair.a), b=jnp.asarray(draws.standard_normal(pair.b.shape), jnp.float32))
        for name, pair in lora.init(jax.random.key(0), model, params, probes)["layers"].items()
    }

    def of_row(params, row):
        def run(a):
            moved = {name: pair.replace(a=a[name]) for name, pair in pairs.items()}
            return outputs(params, moved, jax.tree.map(lambda x: x[None], row))[0]

        values, pull = jax.vjp(run, {name: pair.a for name, pair in pairs.items()})
        return jax.vmap(lambda one: pull(one)[0])(jnp.eye(len(values)))

    run = jax.jit(jax.vmap(of_row, (None, 0)))
    count = len(next(iter(rows.values())))
    chunks = [{name: x[start : start + CHUNK] for name, x in rows.items()} for start in range(0, count, CHUNK)]
    parts = [jax.device_get(run(params, chunk)) for chunk in chunks]
    return {name: _every_layer([part[name] for part in parts], config.rank) for name in pairs}


def _every_layer(parts, rank):
    """A [L, R, I] of a matrix from its gradients, a list of [B, M, L, P, I]."""
    gradients = np.concatenate(parts).astype(np.float64)
    return np.stack([_rows(gradients[:, :, layer], rank) for layer in range(gradients.shape[2])]).astype(np.float32)


def _rows(gradients, rank):
    """A's rows [R, I] of one layer, from [N, M, P, I]."""
    gradients = gradients.reshape(len(gradients), -1, gradients.shape[-1])
    mean = gradients.mean(0)
    apart = (gradients - mean).reshape(-1, mean.shape[1])
    if min(apart.shape) < rank:
        raise ValueError(f"{len(gradients)} public rows do not tell {rank} directions.")
    shared = np.linalg.svd(mean, full_matrices=False)[2][0]
    apart = apart - np.outer(apart @ shared, shared)
    _, spread, along = np.linalg.svd(apart, full_matrices=False)
    if not spread[0] > 0:
        raise ValueError("the public rows are all alike.")
    rows = along[:rank] / np.maximum(spread[:rank], FLOOR * spread[0])[:, None]
    return rows * np.sqrt(rank / 3) / np.linalg.norm(rows)  # Kaiming's rows have mean square 1 / (3 I)
