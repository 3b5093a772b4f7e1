"""The mesh (`clients` x `model`), and how clients, their records and the frozen base lie on it."""

import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dplora_jax.errors import InputError
from dplora_jax.federation.aggregation import CLIENTS
from dplora_jax.federation.client import Client
from dplora_jax.privacy import sampling

MODEL = "model"


def make(spec, clients, model, devices=None):
    """The mesh that `--mesh` asks for: "CxM", or "auto" for as many client rows as there are devices and clients; `devices` None
    are this process's.

    Raises InputError where the devices do not suffice or a model axis does not divide the model's own sizes.
    """
    devices = jax.devices() if devices is None else devices
    if spec == "auto":
        rows, columns = min(len(devices), clients), 1
    else:
        parts = spec.lower().split("x")
        if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
            raise InputError(f"--mesh={spec} is not CLIENTSxMODEL, as in 8x1, nor auto.")
        rows, columns = map(int, parts)
    if rows * columns > len(devices):
        raise InputError(f"--mesh={spec} needs {rows * columns} devices, and there are {len(devices)}.")
    odd = sorted(
        {size for target in model.targets.values() for size in target.shape if size % columns}
        | {n for n in (model.config.num_heads,) if n % columns}
    )
    if odd:
        raise InputError(
            f"--mesh={spec}: a model axis of {columns} does not divide the model's sizes {odd}; use one that does."
        )
    return Mesh(
        np.array(devices[: rows * columns]).reshape(rows, columns), (CLIENTS, MODEL), axis_types=(AxisType.Auto,) * 2
    )


def base_sharding(mesh, params):
    """How the frozen base lies: every matrix split along its last axis over `model` where that divides it, else whole."""
    columns = mesh.shape[MODEL]

    def spec(leaf):
        split = columns > 1 and leaf.ndim >= 2 and leaf.shape[-1] % columns == 0
        return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), MODEL) if split else PartitionSpec())

    return jax.tree.map(spec, params)


class Placement(NamedTuple):
    """Clients and their records on the mesh: `clients` fields [K'] and `data` arrays [devices * N, ...], both split over
    `clients`; K' is K rounded up to the mesh (and to whole waves), with padding clients of weight 0. `records` (populations)
    and `capacity` are the largest of any client, `sizes` [K] their own records."""

    clients: Client
    data: dict
    records: int
    capacity: int
    sizes: list


def place(mesh, shards, mechanisms, clip_norm, wave, ranks=None):
    """Lay out clients for `round.make`: `shards` is a list of dicts of [n_k, ...] arrays, one a client, and
    `mechanisms` says what each samples from, at least its own records.

    Weights are n_k / n; `ranks` are the clients' own, where they have several. Consecutive clients share a device, `wave` of
    them at a time.
    """
    rows, count = mesh.shape[CLIENTS], len(shards)
    sizes = [len(next(iter(shard.values()))) for shard in shards]
    per_device = wave * math.ceil(math.ceil(count / rows) / wave)
    starts = [device * per_device for device in range(rows)]
    records = max(sum(sizes[start : start + per_device]) for start in starts)
    offsets = [sum(sizes[client - client % per_device : client]) for client in range(count)]

    def stacked(name):
        first = shards[0][name]
        out = np.zeros((rows, records, *first.shape[1:]), first.dtype)
        for client, shard in enumerate(shards):
            out[client // per_device, offsets[client] : offsets[client] + sizes[client]] = shard[name]
        return out.reshape(rows * records, *first.shape[1:])

    def padded(values, dtype, fill=0):
        return np.array([*values, *[fill] * (rows * per_device - count)], dtype)

    total = sum(sizes)
    clients = Client(
        offset=padded(offsets, np.int32),
        size=padded(sizes, np.int32),
        population=padded([m.records for m in mechanisms], np.int32),
        join_below=padded([sampling.threshold(m.join_rate) for m in mechanisms], np.int32),
        capacity=padded([m.capacity for m in mechanisms], np.int32),
        divisor=padded([m.sampling_rate * n for m, n in zip(mechanisms, sizes, strict=True)], np.float32, 1),
        noise_std=padded([m.noise_multiplier * clip_norm if m.noise_multiplier else 0 for m in mechanisms], np.float32),
        weight=padded([size / total for size in sizes], np.float32),
        count_std=padded([m.count_noise for m in mechanisms], np.float32),
        rank=padded(ranks or [0] * count, np.int32),
    )
    sharding = NamedSharding(mesh, PartitionSpec(CLIENTS))
    data = {name: jax.device_put(stacked(name), sharding) for name in shards[0]}
    largest = (max(getattr(m, name) for m in mechanisms) for name in ("records", "capacity"))
    return Placement(jax.device_put(clients, sharding), data, *largest, sizes)


def place_keys(mesh, keys, clients):
    """A dispatch's keys (`secrets.round_keys`) or draws (`host_noise.round_draws`) on the mesh: every leaf [rounds, K, ...],
    padded to `clients` with zeros (padding clients never join) and split over the clients axis; the server's are everywhere."""
    everywhere, by_client = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(None, CLIENTS)))

    def put(leaf):
        padding = [(0, 0), (0, clients - leaf.shape[1]), *[(0, 0)] * (leaf.ndim - 2)]
        return jax.device_put(np.pad(leaf, padding), by_client)

    return {
        purpose: jax.device_put(value, everywhere) if purpose == "server" else jax.tree.map(put, value)
        for purpose, value in keys.items()
    }
