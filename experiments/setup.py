"""From a RunConfig to everything that a run needs; every mistake of a user's stops here, before any training."""

import dataclasses
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax import evaluation, lora, losses, models
from dplora_jax.data import tasks
from dplora_jax.errors import InputError
from dplora_jax.federation import mesh, round
from experiments import causes, facts, program, records, released, trust_modes

CHUNK = 128  # rows at a time through the frozen layers
CACHE_BYTES = 4 << 30  # of their outputs, at most


class Prepared(NamedTuple):
    """A run, ready: what `run.train` works with."""

    model: Any
    params: Any
    lora_config: lora.LoraConfig
    federation: round.Federation
    mesh: Any
    placement: mesh.Placement
    mechanisms: list
    state: round.State
    evaluate: Callable
    facts: dict  # what config.json says under "federation"
    causes: dict  # digests of all that decides the bits of a dispatch, to be keyed before they are shown


def prepare(config, stored=None, memo=None):
    """Read, check, calibrate and place everything -> Prepared. `stored` is the config.json of an earlier start, whose
    mechanisms are kept; `memo`, a dict, carries what the frozen layers made of a table to the next call. Raises InputError."""
    corpus, shares = records.load(config)
    sizes = [len(share) for share in shares]
    model, params = models.from_pretrained(config.model, config.dtype, len(corpus.label_names), config.quantize)
    if config.remat:
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=True))
    grid = mesh.make(config.mesh, config.clients, model)
    tokenizer = models.load_tokenizer(config.model)
    tasks.check_length(config.max_length, model, tokenizer)
    train = tasks.classification(tokenizer, corpus.train, config.max_length)
    test = tasks.classification(tokenizer, corpus.test, config.max_length) if corpus.test else None
    if config.private and config.delta * max(sizes) >= 1:
        warnings.warn(
            f"--delta={config.delta:g} is not below 1 / {max(sizes)} records: at that delta, publishing one record whole would "
            "count as private.",
            stacklevel=1,
        )
    mechanisms = trust_modes.settled(config, program.mechanisms(config, sizes, stored))
    adapter, params, lora_config = program.adapter(config, model, params)
    digests = causes.digests(config, (train, shares), model, params, mechanisms, grid)
    params = jax.device_put(params, mesh.base_sharding(grid, params))
    model, train, test = _run_frozen_layers(config, model, params, memo, train, test)
    shards = [{name: array[share] for name, array in train.items()} for share in shares]
    placement = mesh.place(
        grid,
        shards,
        trust_modes.own(config, sizes, mechanisms),
        config.clip_norm,
        program.wave(config),
        config.rank_list,
    )
    federation = program.federation(config, model, losses.classification, mechanisms, adapter, placement)
    state = jax.device_put(federation.init(adapter, config.clients), NamedSharding(grid, PartitionSpec()))
    evaluate = lambda state: {}  # noqa: E731
    if config.eval_every:
        of_adapter = evaluation.classifier(model, grid, params, test)
        evaluate = lambda state: released.metrics(config, sizes, of_adapter, state)  # noqa: E731
    told = facts.of_run(config, corpus, sizes, mechanisms, model, adapter, grid)
    if config.private and not all(math.isfinite(client["epsilon"]) for client in told["clients"]):
        raise InputError(
            f"no finite epsilon holds at --delta={config.delta:g} with this noise: raise delta, or the noise."
        )
    return Prepared(
        model,
        params,
        lora_config,
        federation,
        grid,
        placement,
        mechanisms,
        state,
        evaluate,
        told,
        digests,
    )


def _run_frozen_layers(config, model, params, memo, *tables):
    """Run the layers below the adapted ones once for each record, if the flags allow -> (the model above them, *tables with
    `hidden` in place of `input_ids`). Here all records go through together; in a deployment each client runs its own."""
    depth = model.config.num_layers
    start = depth if config.head_only else depth - (config.last_layers or depth)
    if not start or not config.cache_frozen:
        return model, *tables
    rows = sum(len(table["labels"]) for table in tables if table is not None)
    if 4 * rows * config.max_length * model.config.width > CACHE_BYTES:
        print("warning: the frozen layers' outputs would not fit in memory; they run at each step.", file=sys.stderr)
        return model, *tables
    prefix = jax.jit(lambda params, batch: model.prefix(params, batch, start))

    def run(table):
        if table is None:
            return None
        inputs = {name: table[name] for name in ("input_ids", "attention_mask")}
        key = None if memo is None else (config.model, config.dtype, config.quantize, start, causes.of_arrays(inputs))
        if key is None or key not in memo:
            chunks = [np.asarray(prefix(params, chunk)) for chunk in evaluation.padded_batches(inputs, CHUNK)]
            hidden = np.concatenate(chunks)[: len(table["labels"])]
        else:
            hidden = memo[key]
        if memo is not None:
            memo[key] = hidden
        return {"hidden": hidden, **{name: value for name, value in table.items() if name != "input_ids"}}

    return dataclasses.replace(model, start=start), *map(run, tables)
