"""Noisy scores on the records that clients keep back: each evaluation charged, then computed, then released with its interval.

Every client adds its own noise to its own sums before anyone else sees them, as its uploads carry it: in mode `local` each share
hides its client alone, in mode `distributed` all shares together do, and without privacy there is none.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dplora_jax import evaluation, losses
from dplora_jax.data import records
from dplora_jax.federation import dispatch, final_adapter, fingerprints, held_out, methods, own_rows, processes, trust
from dplora_jax.privacy import secrets, unit_scores

PREFIX = "private_"  # of the names of these scores in a line of metrics


class Measure(NamedTuple):
    """How a run's records are scored: `kind` is one of `unit_scores`, `units` {client: int [I]} the number of the unit that each
    of its records is of, and `run(adapter, residual)` -> {client: the outcomes of these records [I]}, for the clients that this
    process trains for."""

    kind: Any
    units: dict
    run: Callable


def of_rows(loss, prepared, held):
    """The Measure of rows as they train: by their `labels`, of a classifier, else by `loss(model, params)` of the rows.

    A text in several rows has one label, as on a public test set, and a mean of its rows' losses. What has no finite logits
    counts as a wrong label, or as the largest loss: that of guessing among all tokens.
    """
    rows = {k: {n: x for n, x in part.rows.items() if n != records.UNIT} for k, part in held.parts.items()}
    tables = {k: prepared.through_frozen_layers(table) for k, table in rows.items()}
    model = prepared.model
    if "labels" not in next(iter(tables.values())):
        run = own_rows.by_client(
            prepared, tables, lambda based, adapter, batch: loss(model, based)(adapter, batch), held.rows
        )
        units = {k: part.units for k, part in held.parts.items()}
        return Measure(unit_scores.Losses(math.log(model.config.vocab_size)), units, run)
    reader = losses.reader(loss, model, prepared.params)
    classes = reader.config.num_labels
    inputs = {k: {n: array for n, array in table.items() if n != "labels"} for k, table in tables.items()}
    by_row = own_rows.by_client(prepared, inputs, functools.partial(evaluation.label_likelihoods, reader), held.rows)
    firsts = {k: evaluation.firsts(part.rows) for k, part in held.parts.items()}
    labels = {k: table["labels"][firsts[k]] for k, table in rows.items()}

    def run(adapter, residual=()):
        found = by_row(adapter, residual)
        return {k: pairs(labels[k], evaluation.label_said(x, firsts[k]), classes) for k, x in found.items()}

    return Measure(unit_scores.Labels(classes), {k: part.units[firsts[k]] for k, part in held.parts.items()}, run)


def pairs(labels, said, classes):
    """The outcome of each row for `unit_scores.Labels`: its label and what was said, where nothing (UNDECIDED) is a wrong one."""
    wrong = (labels + 1) % classes
    return labels * classes + np.where(said == evaluation.UNDECIDED, wrong, said)


def covered(prepared, held):
    """`prepared` with digests of all its clients' records, those that are kept back included: the ledger speaks of all."""
    if held is None:
        return prepared
    digests = {
        client: fingerprints.digest_arrays(
            [np.frombuffer(digest, np.uint8), held.parts[client].rows, held.parts[client].units]
        )
        for client, digest in prepared.record_digests.items()
    }
    return prepared._replace(record_digests=digests)


def described(description, config, held):
    """`description`, what config.json says of a run, with what it says of the scores on what is `held` back, if anything is."""
    if held is None:
        return description
    cost = held_out.cost(config, held.units)
    return description | {"private_test": cost._asdict(), "trust": [*description["trust"], statement(config, cost)]}


def statement(config, cost):
    """What the guarantee's statements say of scores that cost a `held_out.Cost`."""
    unit = config.privacy.unit
    kept = (
        f"Scores on private records: {sum(cost.units)} {unit}s are kept back, drawn by each client's secret, and never train. "
        f"They are measured {cost.evaluations} times"
    )
    if not trust.mode(config).private:
        return f"{kept}; these scores are EXACT, without noise."
    return (
        f"{kept}, and only counts under Gaussian noise of {cost.noise_multiplier:.4g} times what a {unit} can add are released: "
        f"epsilon {cost.epsilon:.4g} at delta {config.privacy.delta:g} for a {unit} that is kept back. A {unit} either trains or "
        "is kept back, so it pays the larger of the two epsilons, not their sum."
    )


def beside(evaluate, job, held, score):
    """A function (state, number, ends) -> the metrics of `evaluate(state, ends=...)` and, where anything is `held` back, the
    scores of round `number`."""
    scores = scorer(job, held, score) if held else lambda state, number, last: {}
    return lambda state, number, ends=False: (
        evaluate(state, ends=ends) | scores(state, number, last=ends and number > 0)
    )


def scorer(job, held, score):
    """A function (state, number, last) -> the scores of `state` after round `number`, charged to the ledger before they are
    computed; `last` says whether no evaluation follows. None are given once the planned evaluations are paid for, of which one is
    kept for the last round. `score(prepared, held)` gives the Measure."""
    measure = score(job.prepared, held)
    config = job.config
    noise = held_out.noise_multiplier(config)
    shares = trust.mode(config).shares(config, held.units, [held_out.mechanism(noise)] * len(held.units))
    std = math.sqrt(sum(share.noise_multiplier**2 for share in shares))
    bits = unit_scores.grid_bits(noise)

    def scores(state, number, last):
        processes.at(f"charging the evaluation of round {number}")
        paid = processes.agree(lambda: charge(job, number, last, noise))
        if paid is None:
            return {}
        attempt, entry, spent = paid
        processes.once(entry)
        keys = dispatch.paid_secrets(job._replace(paid=entry))
        total = np.zeros(measure.kind.width, np.int64)
        for client, outcomes in _outcomes(job, measure.run, state).items():
            summed = unit_scores.total(measure.kind, outcomes, measure.units[client], bits)
            key = secrets.digest(keys[client], "test noise", number, attempt)
            total += unit_scores.noisy(summed, shares[client].noise_multiplier, bits, key)
        total = np.sum(processes.gather(total.tolist()), 0) / 2.0**bits
        line = {held_out.SPENT: spent}
        for name, values in measure.kind.metrics(total, sum(held.units), std).items():
            line |= {f"{PREFIX}{name}{end}": value for end, value in zip(("", "_low", "_high"), values, strict=True)}
        return line

    return scores


def charge(job, number, last, noise):
    """Charge an evaluation after round `number` -> (attempt, the hash of the entry that pays for it, what such evaluations have
    cost by then), or None where all that were planned are paid for.

    An evaluation that a crash cut off stays paid for, and the next one has keys of its own; only with `seed`, whose noise is not
    secret, is it made again as it was.
    """
    config, ledger = job.config, job.ledger
    entries = ledger.evaluated
    again = config.privacy.seed is not None and ledger.entries and ledger.entries[-1] in entries
    if not (again and entries[-1]["round"] == number):
        left = held_out.evaluations(config) - len(entries)
        if left < (1 if last else 2):
            return None
        attempt = sum(entry["round"] == number for entry in entries)
        ledger.evaluate(number, attempt, noise, job.inputs, **dispatch.guarantee(job))
    entry = ledger.evaluated[-1]
    return entry["attempt"], ledger.head_of(entry), ledger.test_epsilon(config.privacy.delta)


def _outcomes(job, run, state):
    """{client: its rows' outcomes} of the released adapter; where every client keeps its own B, of its own model."""
    config = job.config
    method = methods.BY_NAME[config.aggregation.method]
    if not method.personal:
        return run(final_adapter.adapter(config, state), state.residual)
    found = {}
    for client, adapter in enumerate(final_adapter.personal(config, state)):
        found |= {k: outcomes for k, outcomes in run(adapter, ()).items() if k == client}
    return found
