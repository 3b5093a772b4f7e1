"""The mesh (`clients` x `model`), and how clients, their records and the frozen base lie on it."""

import itertools
import math
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dplora_jax.errors import InputError
from dplora_jax.federation.aggregation import CLIENTS
from dplora_jax.federation.client import Client
from dplora_jax.federation.units import SPANS
from dplora_jax.privacy import sampling

MODEL = "model"


def make(spec, clients, model, devices=None):
    """The mesh that `mesh` asks for: "CxM", or "auto" for as many client rows as there are devices and clients; `devices` None
    are those of all processes. Each process takes part with as many of its devices, which lie side by side.

    Raises InputError where the devices do not suffice or a model axis does not divide the model's own sizes.
    """
    if devices is None:
        devices = jax.devices()
        by_process = [list(group) for _, group in itertools.groupby(sorted(devices, key=_process), _process)]
    else:
        by_process = [devices]
    if spec == "auto":
        each = min([*map(len, by_process), -(-clients // len(by_process))])
        rows, columns = len(by_process) * each, 1
    else:
        parts = spec.lower().split("x")
        if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
            raise InputError(f"mesh={spec} must be CLIENTSxMODEL, as in 8x1, or auto.")
        rows, columns = map(int, parts)
    if rows * columns > len(devices):
        raise InputError(f"mesh={spec} needs {rows * columns} devices, and there are {len(devices)}.")
    each, rest = divmod(rows * columns, len(by_process))
    if rest or each > min(map(len, by_process)):
        raise InputError(
            f"mesh={spec} needs {rows * columns} devices, which the {len(by_process)} processes cannot give in equal "
            "parts: use another mesh, or another number of `processes`."
        )
    odd = sorted(
        {size for target in model.targets.values() for size in target.shape if size % columns}
        | {n for n in (model.config.num_heads,) if n % columns}
    )
    if odd:
        raise InputError(
            f"mesh={spec}: a model axis of {columns} does not divide the model's sizes {odd}; use one that does."
        )
    chosen = np.array([device for group in by_process for device in group[:each]]).reshape(rows, columns)
    return Mesh(chosen, (CLIENTS, MODEL), axis_types=(AxisType.Auto,) * 2)


def _process(device):
    return device.process_index


def per_device(mesh, clients, wave):
    """How many clients, padding ones included, share a device, `wave` of them at a time."""
    return wave * math.ceil(math.ceil(clients / mesh.shape[CLIENTS]) / wave)


def own_clients(mesh, clients, wave, process=None):
    """The numbers of the clients whose records `process` (None: this one) must hold: those on its devices."""
    process = jax.process_index() if process is None else process
    each = per_device(mesh, clients, wave)
    rows = [row for row, devices in enumerate(mesh.devices) if process in map(_process, devices)]
    return [client for client in range(clients) if client // each in rows]


def put(tree, sharding):
    """The arrays of `tree` on the mesh, each process giving what its devices hold; `sharding` is one for all, or a tree of them.

    `jax.device_put` would also compare the whole of each array between processes."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(leaf, sharding):
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    if isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda leaf: place(leaf, sharding), tree)
    return jax.tree.map(place, tree, sharding)


def fetch(tree):
    """The arrays of `tree` whole, in the memory of every process; all processes must call it."""

    def one(leaf):
        if jax.process_count() > 1 and not leaf.is_fully_replicated:
            whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
            leaf = jax.jit(lambda x: x, out_shardings=whole)(leaf)
        return np.asarray(leaf)

    return jax.tree.map(one, tree)


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


def place(mesh, shards, mechanisms, clip_norm, wave, ranks=None, sizes=None, streamed=False, rows=None):
    """Lay out clients for `round.make`: `shards` is a list of dicts of [n_k, ...] arrays, one a client, and
    `mechanisms` says what each samples from, at least its own records.

    Weights are n_k / n; `ranks` are the clients' own, where they have several. Consecutive clients share a device, `wave` of
    them at a time. `sizes`, the public n_k, are needed where this process has not all clients' records: the shards of those
    that are not `own_clients` are not looked at. With `streamed`, records stay where they are, and `data` is empty. Where a
    record has several of the shards' rows, `rows` (`units.Rows`) says which, and n_k counts records.
    """
    sizes = [len(next(iter(shard.values()))) for shard in shards] if sizes is None else sizes
    each, sharding = per_device(mesh, len(shards), wave), NamedSharding(mesh, PartitionSpec(CLIENTS))
    data = {}
    if rows is None and not streamed:
        data = {name: _laid(mesh, [shard[name] for shard in shards], sizes, each) for name in shards[0]}
    elif not streamed:
        room = rows.room(each)
        data = {name: _laid(mesh, [shard[name] for shard in shards], rows.counts, each, room) for name in shards[0]}
        data[SPANS] = _laid(mesh, rows.spans_from(_starts(rows.counts, each)), sizes, each)
    padding = each * mesh.shape[CLIENTS] - len(shards)
    clients = _clients(sizes, mechanisms, clip_norm, ranks, _starts(sizes, each), padding)
    largest = (max(getattr(m, name) for m in mechanisms) for name in ("records", "capacity"))
    return Placement(put(clients, sharding), data, *largest, sizes)


def _starts(counts, each):
    """Each client's first place on its device, where `each` consecutive clients share one and take `counts` places."""
    return [sum(counts[client - client % each : client]) for client in range(len(counts))]


def _laid(mesh, parts, counts, each, room=None):
    """The clients' arrays `parts` (a list of [counts_k, ...]) on their devices, `room` places on each: by default, as many as the
    fullest device takes."""
    devices, starts = mesh.shape[CLIENTS], _starts(counts, each)
    if room is None:
        room = max(sum(counts[first : first + each]) for first in range(0, len(counts), each))

    def block(device):
        out = np.zeros((room, *parts[0].shape[1:]), parts[0].dtype)
        for client in range(device * each, min((device + 1) * each, len(parts))):
            out[starts[client] : starts[client] + counts[client]] = parts[client]
        return out

    sharding = NamedSharding(mesh, PartitionSpec(CLIENTS))
    if jax.process_count() == 1:
        return jax.device_put(np.concatenate([block(device) for device in range(devices)]), sharding)
    shape = (devices * room, *parts[0].shape[1:])
    return jax.make_array_from_callback(shape, sharding, lambda index: block((index[0].start or 0) // room))


def _clients(sizes, mechanisms, clip_norm, ranks, offsets, padding):
    """The Client of all clients, fields [K'], on the host: their own, and those of `padding` clients who have nothing."""

    def padded(values, dtype, fill=0):
        return np.array([*values, *[fill] * padding], dtype)

    total = sum(sizes)
    return Client(
        offset=padded(offsets, np.int32),
        size=padded(sizes, np.int32),
        population=padded([m.records for m in mechanisms], np.int32),
        join_below=padded([sampling.threshold(m.join_rate) for m in mechanisms], np.int32),
        capacity=padded([m.capacity for m in mechanisms], np.int32),
        divisor=padded([m.sampling_rate * n for m, n in zip(mechanisms, sizes, strict=True)], np.float32, 1),
        noise_std=padded([m.noise_multiplier * clip_norm if m.noise_multiplier else 0 for m in mechanisms], np.float32),
        weight=padded([size / total for size in sizes], np.float32),
        count_std=padded([m.count_noise for m in mechanisms], np.float32),
        rank=padded(ranks or [0] * len(sizes), np.int32),
    )


def place_keys(mesh, keys, clients):
    """A dispatch's keys (`secrets.round_keys`) or draws (`host_noise.round_draws`) on the mesh: every leaf [rounds, K, ...],
    padded to `clients` with zeros (padding clients never join) and split over the clients axis; the server's are everywhere."""
    everywhere, by_client = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(None, CLIENTS)))

    def padded(leaf):
        padding = [(0, 0), (0, clients - leaf.shape[1]), *[(0, 0)] * (leaf.ndim - 2)]
        return put(np.pad(leaf, padding), by_client)

    return {
        purpose: put(value, everywhere) if purpose == "server" else jax.tree.map(padded, value)
        for purpose, value in keys.items()
    }
