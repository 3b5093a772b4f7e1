"""Metrics of an adapter on the public test set, computed over the whole mesh."""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax import lora
from dplora_jax.data import tasks
from dplora_jax.federation.aggregation import CLIENTS
from dplora_jax.federation.mesh import put

ROWS = 256  # of a batch on one device


def padded_batches(table, size):
    """The rows of `table` (dict of [N, ...] arrays) as dicts of [size, ...] arrays, the last one filled up with zeros."""
    count = len(next(iter(table.values())))
    for start in range(0, count, size):
        rows = {name: value[start : start + size] for name, value in table.items()}
        yield {
            name: np.pad(value, [(0, size - len(value)), *[(0, 0)] * (value.ndim - 1)]) for name, value in rows.items()
        }


def classifier(model, mesh, params, test):
    """A function (adapter, residual=()) -> {"accuracy", "macro_f1"} over `test` (dict of [N, ...] arrays with `labels`).

    A residual is a change of the base's kernels (`lora.shifted`). `params` lie on the mesh already; the test's rows are split
    over the clients axis, and compiled once; every process gets all predictions.
    """
    labels, count = test["labels"], len(test["labels"])
    devices = mesh.shape[CLIENTS]
    size = devices * min(ROWS, -(-count // devices))
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(CLIENTS), PartitionSpec()))
    inputs = {name: value for name, value in test.items() if name != "labels"}
    batches = [put(batch, split) for batch in padded_batches(inputs, size)]

    @functools.partial(jax.jit, out_shardings=whole)
    def predict(params, adapter, residual, batch):
        based = lora.shifted(model, params, residual) if residual else params
        return model.apply(based, batch, adapter).argmax(-1)

    def evaluate(adapter, residual=()):
        predicted = [predict(params, adapter, residual, batch) for batch in batches]
        predicted = np.concatenate([np.asarray(rows) for rows in predicted])[:count]
        return {
            "accuracy": tasks.accuracy(predicted, labels),
            "macro_f1": tasks.macro_f1(predicted, labels, model.config.num_labels),
        }

    return evaluate
