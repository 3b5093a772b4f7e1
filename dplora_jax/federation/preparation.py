"""From records to a federation that is ready to run: calibrated, its frozen layers run, everything on the mesh."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax import lora
from dplora_jax.errors import InputError, InputWarning
from dplora_jax.federation import (
    calibration,
    fingerprints,
    frozen_layers,
    mesh,
    processes,
    program,
    round,
    streaming,
    trust,
    units,
)
from dplora_jax.federation.clock import Clock
from dplora_jax.privacy import secrets


class Prepared(NamedTuple):
    """A federation whose records lie on its mesh, ready to run."""

    model: Any  # above the frozen layers, where these ran once
    params: Any
    lora_config: lora.LoraConfig
    rounds: round.Rounds  # the static part of the compiled program
    mesh: Any
    placement: mesh.Placement
    stream: Any  # streaming.Stream, or None where the records lie on the devices
    mechanisms: list  # that are accounted
    shares: list  # what each client does of them itself
    sizes: list
    state: round.State
    adapter: Any
    through_frozen_layers: Callable  # takes a table of tokens through the frozen layers, as the records went
    base_digest: bytes
    record_digests: dict  # {client: SHA-256 of its records}, of this process's clients

    @property
    def whole_model(self):
        """The model from its first layer on."""
        return dataclasses.replace(self.model, start=0)


def prepare(config, model, params, loss, grid, shards, stored=None, memo=None, clock=None):
    """The Prepared of `shards` (see `Federation.fit`) on the mesh `grid`. `stored` is the config.json (a dict) of a run that was
    charged already, whose mechanisms are kept; `clock` (a `clock.Clock`) learns how long its parts took. Raises InputError."""
    clock = clock or Clock()
    count = config.schedule.clients
    layout = units.layout(config)
    digests = {k: fingerprints.digest_arrays(shard) for k, shard in enumerate(shards) if shard is not None}
    shards, rows = layout.arranged(shards)
    held = {k: shard for k, shard in enumerate(shards) if shard is not None}
    counts = {k: len(shard["attention_mask"]) for k, shard in held.items()}
    sizes = _all_sizes(units.sizes(shards, rows), count)
    if not held:
        raise InputError("this process holds no client's records: start fewer processes than there are clients.")
    table = {name: np.concatenate([shard[name] for shard in held.values()]) for name in next(iter(held.values()))}
    length = table["attention_mask"].shape[1]
    adapter, params, lora_config, wave = adapter_and_wave(config, grid, model, params, length)
    _warn_of_delta(config, max(sizes))
    with clock.part("calibrating"):
        mechanisms = calibration.kept(stored, sizes) if stored else calibration.mechanisms(config, sizes)
    most = layout.most_rows(sum(sizes))
    streamed = processes.agree(lambda: streaming.wanted(config, grid, table, most))
    base_digest = fingerprints.digest_base(model, params)
    on_mesh = mesh.put(params, mesh.base_sharding(grid, params))
    # Records of one process alone go through its own copy of the base: what lies on all processes' mesh only all can run.
    local = on_mesh if processes.count() == 1 else params
    model, through = frozen_layers.split(config, model, local, most, length, memo, sum(counts.values()))
    with clock.part("frozen layers"):
        table = through(table)
    placed = _shards(table, counts, count)
    parts = trust.mode(config).shares(config, sizes, mechanisms)
    placement = mesh.place(
        grid, placed, parts, config.privacy.clip_norm, wave, config.lora.ranks, sizes, streamed, rows
    )
    rounds = program.federation(config, model, loss, mechanisms, adapter, placement, length, wave, streamed)
    clients = mesh.fetch(placement.clients) if streamed else None
    stream = streaming.Stream(rounds.local, clients, placed, grid, layout, rows) if streamed else None
    state = mesh.put(rounds.init(adapter, count), NamedSharding(grid, PartitionSpec()))
    return Prepared(
        model, on_mesh, lora_config, rounds, grid, placement, stream, mechanisms, parts, sizes, state, adapter, through,
        base_digest, digests,
    )  # fmt: skip


def adapter_and_wave(config, grid, model, params, length):
    """(the adapter before round 1, the base without what is trained, the LoraConfig, how many clients a device computes at a
    time) for rows of `length` tokens."""
    adapter, params, lora_config = program.adapter(config, model, params)
    return adapter, params, lora_config, program.wave(config, grid, model, adapter, length)


def begun(prepared, start=None):
    """The state before round 1 of a Prepared, for the rounds to use up: with the adapter that `start(prepared)` gives, where it
    gives one like `prepared.adapter`, else the fresh one. All processes must call it, and have process 0's."""
    if start is None:
        state = prepared.state
    else:
        adapter = start(prepared)
        shapes = [jax.tree.map(np.shape, tree) for tree in (adapter, prepared.adapter)]
        if shapes[0] != shapes[1]:
            raise InputError("`start` gave an adapter of another form than the federation's: return one like it.")
        adapter = processes.first(jax.tree.map(lambda x: np.asarray(x, np.float32), adapter))
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(adapter)):
            raise InputError("`start` gave an adapter with numbers that are not finite.")
        state = mesh.put(
            prepared.rounds.init(adapter, len(prepared.sizes)), NamedSharding(prepared.mesh, PartitionSpec())
        )
    return jax.tree.map(jax.numpy.copy, state)  # it is donated, and shares the head with the base


def _warn_of_delta(config, largest):
    """Warn where delta is too large for a client of `largest` records."""
    privacy = config.privacy
    if trust.mode(config).private and privacy.delta * largest >= 1:
        warnings.warn(
            f"delta={privacy.delta:g} is not below 1 / {largest} records: at that delta, publishing one record whole would "
            "count as private.",
            InputWarning,
            stacklevel=2,
        )


def _shards(table, counts, clients):
    """`table`, the rows of the clients that are held here ({client: how many} in `counts`), in their order, as a list of one dict
    a client (the others' empty)."""
    shards, start = [], 0
    for client in range(clients):
        end = start + counts.get(client, 0)
        shards.append({name: array[start:end] for name, array in table.items()})
        start = end
    return shards


def _all_sizes(sizes, clients):
    """Every client's n_k, which are public, from the processes that hold their records ({client: n_k} of this one)."""
    known = {int(k): n for part in processes.gather(sizes) for k, n in part.items()}
    return [known[k] for k in range(clients)]


def records_digest(prepared, keys):
    """The digest of all clients' records, whoever holds them. Between processes go keyed digests alone: a plain one would tell
    the network who is in. Raises InputError where processes have different models or programs."""
    keyed = {k: secrets.digest(keys[k], "records", digest.hex()).hex() for k, digest in prepared.record_digests.items()}
    same = {"base model": prepared.base_digest.hex(), "program": fingerprints.digest_installation().hex()}
    gathered = processes.gather({"records": keyed, **same})
    for name in same:  # else one process would train another model, and nothing would say so
        for number, process in enumerate(gathered):
            if process[name] != gathered[0][name]:
                raise InputError(f"process {number} has another {name} than process 0: give all the same.")
    merged = {int(k): digest for process in gathered for k, digest in process["records"].items()}
    return fingerprints.digest_arrays([np.frombuffer(bytes.fromhex(merged[k]), np.uint8) for k in sorted(merged)])
