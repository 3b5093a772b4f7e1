"""A start from public text: the adapter and the head are trained on public records, without noise, before the first round.

Nothing private is read, so whatever comes of it costs no privacy (PRIVACY.md). Letters: N records, B rows of a step.
"""

import functools
import math
import warnings

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax.data import public_table, records
from dplora_jax.errors import InputError, InputWarning
from dplora_jax.federation import fingerprints, frozen_layers, mesh, processes
from dplora_jax.federation.aggregation import CLIENTS
from dplora_jax.finetuning import dealing

ORDER = 2  # tells the draws of the rows' order from others by `split_seed`


def read(config, corpus, private=()):
    """The public Records that `config` names, for the task of `corpus`; None where nothing is to be trained on first. Warns where
    the public test set holds some of them. Raises InputError, also where they hold every one of the `private` records (a list of
    Records, one a client) or of one client's."""
    if not config.public.trains:
        return None
    renamed = dict(entry.split(":", 1) for entry in config.public.labels)
    public = public_table.read(config.public.data, dealing.source_of(config), corpus.task, renamed)
    what = f"public_data={config.public.data}"
    records.refuse_copy(private, records.columns_of(public), what, "public records to train on")
    known = set(_contents(public))
    shared = 0 if corpus.test is None else sum(one in known for one in _contents(corpus.test))
    if shared:
        warnings.warn(
            f"{what} holds {shared} of the {len(corpus.test.texts)} records of the public test set: its scores will flatter.",
            InputWarning,
            stacklevel=2,
        )
    return public


def words(config, public):
    """The line of config.json's method on the start; none where there is none. `public` are its Records, where they were read."""
    if not config.public.trains:
        return []
    count = "" if public is None else f"{len(public.texts)} "
    return [
        f"trained first on {count}public records of {public_table.name(config.public.data)}, {config.public.epochs} passes "
        f"of Adam at learning rate {config.public.lr:g}, without noise: public records cost no privacy"
    ]


def trained(config, objective, public, memo, prepared):
    """The adapter of a `preparation.Prepared` after `public_epochs` passes of Adam over the Records `public`: a tree like
    `prepared.adapter`, float32, on the host. Of `prepared` it reads nothing that depends on private records; `memo`, a dict or
    None, keeps it for the next call with the same.

    The loss is the mean over a step's rows of the objective's own, in an order drawn by `split_seed`; the learning rate falls
    linearly to 0. Raises InputError where it comes to numbers that are not finite. All processes must call it.
    """
    table = {name: array for name, array in objective.train(public).items() if name != records.UNIT}
    make = functools.partial(_passes, config, objective.loss, table, prepared)
    if memo is None:
        return make()
    fields = (config.public, config.schedule.split_seed, objective.kind, objective.words)
    base = (prepared.base_digest, prepared.mesh, jax.tree.structure(prepared.adapter))
    return fingerprints.remembered(memo, (fields, base), (table, prepared.adapter), make)


def _passes(config, loss, table, prepared):
    """`trained` on a `table` {name: [N, ...]} of rows."""
    count, length = table["attention_mask"].shape
    model = prepared.model if frozen_layers.fit_in_memory(prepared.model, count, length) else prepared.whole_model
    if model.start:
        table = prepared.through_frozen_layers(table)
    public, grid = config.public, prepared.mesh
    split, whole = (NamedSharding(grid, spec) for spec in (PartitionSpec(CLIENTS), PartitionSpec()))
    size = min(public.batch_size, count)
    rows = -(-size // grid.shape[CLIENTS]) * grid.shape[CLIENTS]
    optimizer = optax.adam(optax.linear_schedule(public.lr, 0.0, public.epochs * -(-count // size)))

    def mean(adapter, params, batch, weights_B):
        return (weights_B * loss(model, params)(adapter, batch)).sum() / weights_B.sum()

    @functools.partial(jax.jit, out_shardings=whole)
    def step(adapter, state, params, batch, weights_B):
        value, gradient = jax.value_and_grad(mean)(adapter, params, batch, weights_B)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    adapter = mesh.put(prepared.adapter, whole)
    state = mesh.put(optimizer.init(prepared.adapter), whole)
    for epoch in range(public.epochs):
        processes.at(f"pass {epoch + 1} over the public records")
        for chosen, weights_B in batches(count, size, rows, (config.schedule.split_seed, ORDER, epoch)):
            batch = mesh.put({name: array[chosen] for name, array in table.items()}, split)
            adapter, state, value = step(adapter, state, prepared.params, batch, mesh.put(weights_B, split))
    if not math.isfinite(float(value)) or not all(
        np.isfinite(leaf).all() for leaf in jax.tree.leaves(mesh.fetch(adapter))
    ):
        raise InputError(f"public_lr={public.lr:g} led to numbers that are not finite: lower it.")
    return mesh.fetch(adapter)


def batches(count, size, rows, seed):
    """Each step's (rows' numbers [B], float32 weights [B]) of one pass over `count` rows in an order drawn by `seed`: `size` rows
    a step, fewer in the last, and up to B = `rows` by copies of weight 0."""
    order = np.random.default_rng(seed).permutation(count)
    for first in range(0, count, size):
        chosen = order[first : first + size]
        filled = np.concatenate([chosen, np.repeat(chosen[:1], rows - len(chosen))])
        yield filled, (np.arange(rows) < len(chosen)).astype(np.float32)


def _contents(table):
    """Each of the Records `table` as what makes two of them the same to a reader."""
    return list(zip(table.texts, table.answers or table.texts, strict=True))
