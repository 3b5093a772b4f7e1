"""What the base model alone makes of records, once, before training: features to centre by, and the frozen layers' outputs."""

import dataclasses
import sys

import jax
import numpy as np

from dplora_jax import evaluation
from dplora_jax.errors import InputError
from dplora_jax.federation import fingerprints, processes
from dplora_jax.models import features

CHUNK = 128  # rows at a time
PUBLIC_ROWS = 512  # whose features are looked at, evenly spaced
CACHE_BYTES = 4 << 30  # of the frozen layers' outputs, at most


def with_features(config, model, params, test, memo, stored):
    """`params` with how features are centred, and the head on them, where `feature_norm` asks for it: as an earlier start had it
    (its checkpoints hold a head on those), else as process 0 measures it on public text."""
    if not config.base.feature_norm:
        return params
    if "bias" not in params.get("head", {}):
        raise InputError("`feature_norm` is for a classifier whose head has a bias, as BERT's: leave it out.")
    if test is None:
        raise InputError("`feature_norm` is measured on a public test set, and there is none: see `test_data`.")
    found = stored["federation"].get("features") if stored else None
    found = found or processes.agree(lambda: _measured(config, model, params, test, memo))
    found = {name: np.asarray(value, np.float32) for name, value in found.items()}
    return params | {features.KEY: found, "head": features.inward(params["head"], found)}


def _measured(config, model, params, test, memo):
    """`features.measure` of some public rows, as JSON."""
    count = len(test["attention_mask"])
    rows = np.unique(np.linspace(0, count - 1, min(count, PUBLIC_ROWS)).astype(int))
    inputs = {name: test[name][rows] for name in ("input_ids", "attention_mask")}
    named = (features.KEY, config.base.name, config.base.dtype, config.base.quantize)
    pooled = _once(memo, named, jax.jit(model.features), params, inputs)
    try:
        found = features.measure(pooled, config.base.feature_norm)
    except ValueError as error:
        raise InputError(f"feature_norm={config.base.feature_norm:g}: {error}") from None
    return {name: value.tolist() for name, value in found.items()}


def run_frozen_layers(config, model, params, memo, count, *tables):
    """Run the layers below the adapted ones once for each record, if the flags allow -> (the model above them, *tables with
    `hidden`, which for a classifier takes the place of `input_ids`). The first table is of this process's clients; all clients
    have `count` records."""
    depth = model.config.num_layers
    start = depth if config.lora.head_only else depth - (config.lora.last_layers or depth)
    if not start or not config.execution.cache_frozen:
        return model, *tables
    rows = count + sum(len(table["attention_mask"]) for table in tables[1:] if table is not None)
    if 4 * rows * config.data.max_length * model.config.width > CACHE_BYTES:
        print("warning: the frozen layers' outputs would not fit in memory; they run at each step.", file=sys.stderr)
        return model, *tables
    prefix = jax.jit(lambda params, batch: model.prefix(params, batch, start))
    named = (config.base.name, config.base.dtype, config.base.quantize, start)

    def run(table):
        if table is None:
            return None
        inputs = {name: table[name] for name in ("input_ids", "attention_mask")}
        if len(inputs["input_ids"]):
            hidden = _once(memo, named, prefix, params, inputs)
        else:
            hidden = np.zeros((0, config.data.max_length, model.config.width), model.dtype)
        above = {"hidden": hidden, **table}
        if "labels" in table:  # a language model's targets are its tokens
            del above["input_ids"]
        return above

    return dataclasses.replace(model, start=start), *map(run, tables)


def _once(memo, named, run, params, inputs):
    """`run(params, batch)` of all rows of `inputs` {name: [N, ...]}, N > 0, on the host; `memo` (a dict, or None) keeps it
    for the next call with the same rows and the same `named`, which says all else."""
    key = None if memo is None else (named, fingerprints.of_arrays(inputs))
    if key is not None and key in memo:
        return memo[key]
    chunks = [np.asarray(run(params, chunk)) for chunk in evaluation.padded_batches(inputs, CHUNK)]
    found = np.concatenate(chunks)[: len(inputs["input_ids"])]
    if key is not None:
        memo[key] = found
    return found
