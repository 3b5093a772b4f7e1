"""The layers below the adapted ones, run once for each record and not at each step."""

import dataclasses
import sys

import jax
import numpy as np

from dplora_jax import evaluation, lora
from dplora_jax.errors import InputError
from dplora_jax.federation import fingerprints
from dplora_jax.models import features

CHUNK = 128  # rows at a time
CACHE_BYTES = 4 << 30  # of their outputs, at most


def first_adapted(config, model):
    """The first layer that training changes: those below it always give the same."""
    depth = model.config.num_layers
    return depth if config.lora.head_only else depth - (config.lora.last_layers or depth)


def fit_in_memory(model, rows, length):
    """Whether the outputs for `rows` rows of `length` tokens are no more than CACHE_BYTES."""
    return 4 * rows * length * model.config.width <= CACHE_BYTES


def reads_tokens(model, table):
    """Whether the layers above, or the loss, read the tokens of `table` beside `hidden`: they are a language model's targets."""
    return "labels" not in table or getattr(model, "reads_ids", False)


def split(config, model, params, rows, length, memo=None, held=0):
    """The model above the frozen layers, and a function that takes a table {name: [N, ...]} through them, once for each row ->
    (model, run), where `config` lets `rows` rows of `length` tokens be kept; else (model, what leaves a table as it is). Where
    rows have no public bound (None), and `held` of them are here, what a step computes is not to tell how many: they are kept, or
    InputError is raised.

    `run` gives a table with `hidden`, which for labels takes the place of `input_ids`. `memo`, a dict, carries what was made of a
    table to the next call.
    """
    start = first_adapted(config, model)
    if not start or not config.execution.cache_frozen:
        return model, lambda table: table
    fit = fit_in_memory(model, held if rows is None else rows, length)
    if not fit and rows is None:
        raise InputError("the frozen layers' outputs for all rows would not fit in memory: give cache_frozen=false.")
    if not fit:
        print("warning: the frozen layers' outputs would not fit in memory; they run at each step.", file=sys.stderr)
        return model, lambda table: table
    prefix = jax.jit(lambda params, batch: model.prefix(params, batch, start))
    own = {name: part for name, part in params.items() if name not in (*lora.FROZEN.values(), features.KEY)}
    base = None if memo is None else fingerprints.digest_base(model, own)  # nothing else passes through these layers

    def run(table):
        inputs = {name: table[name] for name in ("input_ids", "attention_mask")}
        if len(inputs["input_ids"]):
            hidden = remembered(memo, (base, start), prefix, params, inputs)
        else:
            hidden = np.zeros((0, length, model.config.width), model.dtype)
        above = {"hidden": hidden, **table}
        if not reads_tokens(model, table):
            del above["input_ids"]
        return above

    return dataclasses.replace(model, start=start), run


def remembered(memo, named, run, params, inputs):
    """`run(params, batch)` of all rows of `inputs` {name: [N, ...]}, N > 0, on the host; `memo` and `named`, which says all else,
    as for `fingerprints.remembered`."""

    def outputs():
        chunks = [np.asarray(run(params, chunk)) for chunk in evaluation.padded_batches(inputs, CHUNK)]
        return np.concatenate(chunks)[: len(inputs["input_ids"])]

    return fingerprints.remembered(memo, named, inputs, outputs)
