"""Bases from public text: for each adapted matrix the A and the B between which a small core learns most of each record.

A record's gradient for a change of a matrix W is a sum of delta x^T over its tokens. The inputs x of all texts share most of
their length, and so do the deltas: the gradients of all records are nearly parallel (one direction has two thirds of their
second moment), which says no more than which label is common, and bounds the learning rate. Here A's rows and B's columns are
orthogonal to what public texts share and weigh the rest alike, so that a plain step on the core is nearly a natural one.

LoRA-XS (Balazy et al. 2024, arXiv 2405.17604) has the singular vectors of W in their place, EVA (Paischer et al. 2024, arXiv
2410.07170) an A from inputs, LoRA-GA (Wang et al. 2024, arXiv 2407.05000) both from a gradient; these are of gradients that are
centred and whitened, of public text alone.

Letters: N rows of text, M outputs, P probes, L layers, I inputs, O outputs of a matrix, R rank.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dplora_jax import lora

PROBES = 4  # random directions of a matrix's outputs: of each, what moves it
CHUNK = 8  # rows at a time
FLOOR = 1e-2  # of the largest spread: directions with less count as this much


def shapes(model, params, config):
    """What `bases` gives, as jax.ShapeDtypeStruct."""
    pairs = jax.eval_shape(lambda params: lora.init(jax.random.key(0), model, params, config)["layers"], params)
    return {name: {"a": pair.a, "b": pair.b} for name, pair in pairs.items()}


def bases(outputs, model, params, config, rows, seed=0):
    """A and B for each matrix that `config` (a `lora.LoraConfig`) adapts -> {target: {"a": [L, R, I], "b": [L, O, R]}}, float32.

    `outputs(params, pairs, batch)` gives [B, M] numbers that are to tell texts apart, through the `lora.Pair`s {target: Pair}, of
    a batch {name: [B, ...]}; `rows` {name: [N, ...]} are public. A comes of each row's gradients by A under a random B, and B of
    its gradients by B under that A, each centred over the rows: of what is left beside the direction that all share, the R
    largest directions, divided by their spread. B is scaled so that a row's gradient of an output by all cores has mean square
    1: a learning rate then means the same for every model. Raises ValueError where the rows tell fewer than R directions.
    """
    fresh = lora.init(jax.random.key(0), model, params, config)["layers"]
    draws = np.random.default_rng(seed)

    def probe(pair):
        (layers, _, size_in), size_out = pair.a.shape, pair.b.shape[1]
        b = jnp.asarray(draws.standard_normal((layers, size_out, PROBES)), jnp.float32)
        return pair.replace(a=jnp.zeros((layers, PROBES, size_in)), b=b)

    probes = {name: probe(pair) for name, pair in fresh.items()}
    a = {
        name: np.stack([_whitened(layer, config.rank) for layer in layers])
        for name, layers in _gradients(outputs, params, probes, "a", rows).items()
    }
    halves = {name: pair.replace(a=jnp.asarray(a[name]), b=jnp.zeros_like(pair.b)) for name, pair in fresh.items()}
    b, square = {}, 0.0
    for name, layers in _gradients(outputs, params, halves, "b", rows).items():
        by_layer = []
        for layer in layers:
            by_layer.append(_whitened(np.swapaxes(layer, -1, -2), config.rank))
            cores = np.einsum("so,nmor->nmsr", by_layer[-1], layer)
            square += np.square(cores).sum((-1, -2)).mean()
        b[name] = np.swapaxes(np.stack(by_layer), 1, 2)
    length = np.sqrt(square) if square > 0 else 1.0
    return {name: {"a": np.float32(a[name]), "b": np.float32(b[name] / length)} for name in fresh}


def _gradients(outputs, params, pairs, letter, rows):
    """The gradients of each output of each row by `letter` ("a" or "b") of each pair -> {target: [L, N, M, ...]} float32."""

    def of_row(params, row):
        def run(trained):
            moved = {name: pair.replace(**{letter: trained[name]}) for name, pair in pairs.items()}
            return outputs(params, moved, jax.tree.map(lambda x: x[None], row))[0]

        values, pull = jax.vjp(run, {name: getattr(pair, letter) for name, pair in pairs.items()})
        return jax.vmap(lambda one: pull(one)[0])(jnp.eye(len(values)))

    run = jax.jit(jax.vmap(of_row, (None, 0)))
    count = len(next(iter(rows.values())))
    chunks = [{name: x[start : start + CHUNK] for name, x in rows.items()} for start in range(0, count, CHUNK)]
    parts = [jax.device_get(run(params, chunk)) for chunk in chunks]
    return {name: np.moveaxis(np.concatenate([part.pop(name) for part in parts]), 2, 0) for name in pairs}


def _whitened(gradients, rank):
    """[R, I]: the directions in which gradients [N, M, P, I] of one layer differ, each divided by its spread."""
    gradients = gradients.reshape(len(gradients), -1, gradients.shape[-1]).astype(np.float64)
    mean = gradients.mean(0)
    apart = (gradients - mean).reshape(-1, mean.shape[1])
    if min(apart.shape) < rank:
        raise ValueError(f"{len(gradients)} public texts do not tell {rank} directions.")
    shared = np.linalg.svd(mean, full_matrices=False)[2][0]
    apart = apart - np.outer(apart @ shared, shared)
    _, spread, along = np.linalg.svd(apart, full_matrices=False)
    if not spread[0] > 1e-6 * np.linalg.norm(mean):
        raise ValueError("the public texts are all alike.")
    spread = spread[:rank] / np.sqrt(len(apart))
    return along[:rank] / np.maximum(spread, FLOOR * spread[0])[:, None]
