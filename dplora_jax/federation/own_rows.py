"""Something computed for every row of every client, each row on the devices of its own client: no row, and nothing exact that is
made of one, passes between processes.

Letters: R rows of the mesh (devices of the clients axis), N rows of records on each, B of them at a time.
"""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax import evaluation, lora
from dplora_jax.federation import mesh
from dplora_jax.federation.aggregation import CLIENTS


def by_client(prepared, tables, compute, room):
    """A function (adapter, residual=()) -> {client: [n_k, ...]}: `compute(params, adapter, batch)` -> [B, ...] over the rows of
    each of `tables` {client: {name: [n_k, ...]}}, those of the clients that this process trains for. All processes must call it.
    Shapes, and how many batches there are, follow `room` [K] alone: the most rows of each of all clients, a public number.

    `prepared` is a `preparation.Prepared`, whose frozen layers these rows have been through.
    """
    model, grid, params = prepared.model, prepared.mesh, prepared.params
    each = mesh.per_device(grid, len(prepared.sizes), prepared.rounds.wave)
    clients_of = {}  # mesh row -> its clients
    for client in tables:
        clients_of.setdefault(client // each, []).append(client)
    count = max(sum(room[first : first + each]) for first in range(0, len(room), each))
    length = next(iter(tables.values()))["attention_mask"].shape[1]
    size = max(1, min(evaluation.ROWS, evaluation.TOKENS // length, count))
    split = NamedSharding(grid, PartitionSpec(CLIENTS))
    laid = {row: _together(tables[client] for client in clients) for row, clients in clients_of.items()}
    batches = [
        mesh.put(_batch(laid, grid.shape[CLIENTS], start, size), split) for start in range(0, max(count, 1), size)
    ]

    @functools.partial(jax.jit, out_shardings=split)
    def one(params, adapter, residual, batch):
        return compute(lora.shifted(model, params, residual) if residual else params, adapter, batch)

    def run(adapter, residual=()):
        outputs = [_local(one(params, adapter, residual, batch), size) for batch in batches]
        found = {}
        for row, clients in clients_of.items():
            values = np.concatenate([output[row] for output in outputs])
            ends = np.cumsum([0, *(_rows([tables[client]]) for client in clients)])
            found |= {k: values[a:b] for k, a, b in zip(clients, ends[:-1], ends[1:], strict=True)}
        return found

    return run


def _rows(tables):
    return sum(len(table["attention_mask"]) for table in tables)


def _together(tables):
    tables = list(tables)
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _batch(laid, rows, start, size):
    """Rows `start` to `start + size` of each mesh row, filled up with zeros -> {name: [R * B, ...]}; those of other processes'
    mesh rows are zeros, which nobody reads."""
    like = next(iter(laid.values()))
    batch = {name: np.zeros((rows * size, *array.shape[1:]), array.dtype) for name, array in like.items()}
    for row, table in laid.items():
        for name, array in table.items():
            part = array[start : start + size]
            batch[name][row * size : row * size + len(part)] = part
    return batch


def _local(array, size):
    """{mesh row: [B, ...]} of what this process's devices hold of an array [R * B, ...]."""
    return {(shard.index[0].start or 0) // size: np.asarray(shard.data) for shard in array.addressable_shards}
