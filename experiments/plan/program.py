"""The program of a run, made and compiled from shapes alone: nothing is read, and no device holds anything.

Letters: K clients, N records of the largest client, T tokens.
"""

import dataclasses
import math
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax import losses
from dplora_jax.errors import InputError
from dplora_jax.federation import calibration, frozen_layers, mesh, participation, program, round, trust
from dplora_jax.federation.aggregation import CLIENTS
from dplora_jax.models import features, public_bases
from experiments.plan import CLASSIFICATION, LABEL_WORDS, LANGUAGE_MODEL, flops
from experiments.plan import collectives as plan_collectives
from experiments.plan import models as plan_models


class Program(NamedTuple):
    """What `round.make` takes and is called with: `arguments` are (state, params, clients, data, keys) of
    jax.ShapeDtypeStruct, sharded; `clients` is how many clients a device computes, one wave after the other."""

    federation: round.Rounds
    mesh: jax.sharding.Mesh
    arguments: tuple
    clients: int


class Work(NamedTuple):
    """What one chip does in one round: operations of its matrix products, as one counts them and in bfloat16 passes (the highest
    precision takes six); bytes of weights that it reads at least; bytes that it sends to other chips, {collective: bytes}."""

    flops: float
    passes: float
    memory: float
    sent: dict


class Measured(NamedTuple):
    """One dispatch of one round on one chip. Bytes: `arguments`, of which `base` is the frozen model, `temporaries`, `outputs`
    beyond the donated arguments, `code`; `total` is what the compiler says it needs, fit or not; the rest, where it does not, is
    None."""

    fits: bool
    total: float
    arguments: float
    base: float
    temporaries: float | None = None
    outputs: float | None = None
    code: float | None = None
    seconds: float | None = None  # of compiling
    work: Work | None = None


def abstract(config, devices, sizes, task, classes):
    """The Program of one round of `config` on `devices`, its K clients having `sizes` records. Raises InputError."""
    if task != CLASSIFICATION and plan_models.default_task(config.base.name) == CLASSIFICATION:
        raise InputError(f"--task={task} needs a model that reads from left to right: an encoder says no next token.")
    if task == LANGUAGE_MODEL and config.lora.core:
        raise InputError("--core needs labels: give --task=label_words.")
    model, params = plan_models.build(config.base, classes if task == CLASSIFICATION else None)
    if config.data.max_length > model.config.max_positions:
        raise InputError(
            f"--max_length={config.data.max_length} is more than the model's {model.config.max_positions}."
        )
    grid = mesh.make(config.execution.mesh, config.schedule.clients, model, devices)
    mechanisms = calibration.mechanisms(config, sizes)
    measured = {"bias": jax.ShapeDtypeStruct((classes,), np.float32)} if task == LABEL_WORDS else {}  # of each word
    if config.lora.core:
        measured |= {features.BASES: public_bases.shapes(model, params, program.lora_config(config))}
    params |= {features.KEY: measured} if measured else {}
    adapter, params = jax.eval_shape(lambda params: program.adapter(config, model, params)[:2], params)
    model, row = _rows(config, model, task, sum(sizes))
    wave = program.wave(config, grid, model, adapter, config.data.max_length)
    shards = [
        {name: np.broadcast_to(np.zeros((), kind), (n, *rest)) for name, (rest, kind) in row.items()} for n in sizes
    ]
    shares = trust.mode(config).shares(config, sizes, mechanisms)
    limits = []

    def place():
        placement = mesh.place(grid, shards, shares, config.privacy.clip_norm, wave, config.lora.ranks)
        limits.append(placement)
        return placement.clients, placement.data

    clients, data = jax.eval_shape(place)
    kinds = {
        CLASSIFICATION: losses.classification,
        LANGUAGE_MODEL: losses.language_model,
        LABEL_WORDS: losses.label_words(range(classes)),  # which tokens the words are decides no byte
    }
    federation = program.federation(
        config, model, kinds[task], mechanisms, adapter, limits[0], config.data.max_length, wave
    )
    state = jax.eval_shape(lambda adapter: federation.init(adapter, config.schedule.clients), adapter)
    count = clients.size.shape[0]
    keys = _keys(config, federation.local, adapter, count)
    everywhere, by_client, by_round = (
        NamedSharding(grid, spec) for spec in (PartitionSpec(), PartitionSpec(CLIENTS), PartitionSpec(None, CLIENTS))
    )
    arguments = (
        _laid(state, everywhere),
        jax.tree.map(_laid, params, mesh.base_sharding(grid, params)),
        _laid(clients, by_client),
        _laid(data, by_client),
        {name: _laid(value, everywhere if name == "server" else by_round) for name, value in keys.items()},
    )
    return Program(federation, grid, arguments, count // grid.shape[CLIENTS])


def _laid(tree, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _rows(config, model, task, records):
    """The model that the rounds run, and a row of each of its arrays {name: (shape, dtype)}: as `data.tasks` makes them, above
    the frozen layers where a run would go through those once."""
    length, integers = (config.data.max_length,), np.int32
    tokens = {"input_ids": (length, integers)}
    row = {"attention_mask": (length, integers)}
    row |= {"loss_mask": (length, integers)} if task == LANGUAGE_MODEL else {"labels": ((), integers)}
    start = frozen_layers.first_adapted(config, model)
    fits = frozen_layers.fit_in_memory(model, records, config.data.max_length)
    if not (start and config.execution.cache_frozen and fits):
        return model, row | tokens
    row |= {"hidden": ((*length, model.config.width), model.dtype)}
    return dataclasses.replace(model, start=start), row | (tokens if frozen_layers.reads_tokens(model, row) else {})


def _keys(config, local, adapter, count):
    """What one round of `count` clients (padding included) draws from."""
    trust_mode, partial = trust.mode(config), participation.partial(config)
    parties = trust_mode.parties(config) - config.schedule.clients + count
    keys = local.noise.key_shapes(parties, count, trust_mode.joining(config), local, adapter)
    return keys | ({"joins": jax.ShapeDtypeStruct((1, count), jnp.float32)} if partial else {})


def device_bytes(tree):
    """Bytes of sharded arguments on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def measure(program, hbm, compiling=lambda lowered: lowered.compile()):
    """Compile the program for its mesh's devices, each with `hbm` bytes of memory -> Measured."""
    arguments, base = device_bytes(program.arguments), device_bytes(program.arguments[1])
    if arguments > hbm:  # no need to compile
        return Measured(False, arguments, arguments, base)
    platform = program.mesh.devices.flat[0].platform
    start = time.perf_counter()
    traced = round.make(program.federation, program.mesh).trace(*program.arguments)
    try:
        compiled = compiling(traced.lower(lowering_platforms=(platform,)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Measured(False, _used(str(error)), arguments, base, seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = (memory.argument_size_in_bytes, memory.temp_size_in_bytes, outputs, memory.generated_code_size_in_bytes)
    work = _work(program, compiled.as_text())
    return Measured(sum(parts) <= hbm, sum(parts), parts[0], base, *parts[1:], seconds, work)


def read_bytes(program):
    """Bytes of the base that a pass over rows reads on one device: the layers that have not run before, and all else."""
    model, params = program.federation.model, program.arguments[1]
    return device_bytes(params) - device_bytes(params["layers"]) * model.start / model.config.num_layers


def _work(program, text):
    """The Work of a compiled program. Products are those of the traced round, which a model axis splits evenly; each pass over
    rows reads the base twice (forward, backward) and the adapter three times (the update too)."""
    step, local = round.make(program.federation, program.mesh), program.federation.local
    products, exact = (flops.count(step, *program.arguments, exact=exact) for exact in (False, True))
    split = program.mesh.shape[mesh.MODEL]
    rows = local.microbatch or local.capacity
    passes = local.local_steps * math.ceil(program.clients / program.federation.wave) * math.ceil(local.capacity / rows)
    adapter = device_bytes(program.arguments[0].adapter)
    memory = passes * (2 * read_bytes(program) + 3 * adapter)
    return Work(products / split, (products + 5 * exact) / split, memory, plan_collectives.sent(text))


def _used(message):
    """Bytes that the compiler says it would have needed; infinite where it does not say."""
    match = re.search(r"[Uu]sed ([\d.]+)([KMGT]?)", message)
    return float(match.group(1)) * 1024 ** " KMGT".index(match.group(2) or " ") if match else math.inf
