"""Metrics of an adapter on the public test set, computed over the whole mesh."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

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
    """A function adapter -> {"accuracy", "macro_f1"} over `test` (dict of [N, ...] arrays with `labels`).

    `params` lie on the mesh already; the test's rows are split over the clients axis, and compiled once;
    every process gets all predictions.
    """
    labels, count = test["labels"], len(test["labels"])
    devices = mesh.shape[CLIENTS]
    size = devices * min(ROWS, -(-count // devices))
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(CLIENTS), PartitionSpec()))
    inputs = {name: value for name, value in test.items() if name != "labels"}
    batches = [put(batch, split) for batch in padded_batches(inputs, size)]
    predict = jax.jit(
        lambda params, adapter, batch: model.apply(params, batch, adapter).argmax(-1), out_shardings=whole
    )

    def evaluate(adapter):
        predicted = [predict(params, adapter, batch) for batch in batches]
        predicted = np.concatenate([np.asarray(rows) for rows in predicted])[:count]
        return {
            "accuracy": tasks.accuracy(predicted, labels),
            "macro_f1": tasks.macro_f1(predicted, labels, model.config.num_labels),
        }

    return evaluate
