"""One dispatch of rounds after another: charged to the ledger, run, saved, committed, and only then shown."""

import functools
import os
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from dplora_jax.config import FIELDS, to_flat
from dplora_jax.errors import InputError
from dplora_jax.federation import budgets, mesh, participation, processes, round, streaming, trust
from dplora_jax.privacy import ledger as ledgers
from dplora_jax.privacy import secrets

# The sections whose fields the compiled rounds are built of, and those of them that only reach them as arguments.
BUILT_OF = ("lora", "privacy", "schedule", "optimizer", "aggregation", "execution")
ARGUMENTS = (
    *("epsilon", "delta", "noise_multiplier", "count_noise_multiplier", "seed", "split_seed"),
    *("dispatch_rounds", "eval_every", "coordinator", "processes", "process", "stall_timeout"),
)


class Job(NamedTuple):
    """A run under way: its configuration, what was prepared of it, where it is kept, the parties' secrets, the digests of what it
    works with, and the programs that are compiled already {shapes: program}. `paid` is the hash of the entry that paid for the
    dispatch under way (None: the ledger's last), and `earlier` are the dispatches that its noise goes on from, (rounds, attempt,
    hash) each (None: as the ledger has them)."""

    config: Any
    prepared: Any
    storage: Any
    secrets: list
    inputs: dict
    description: dict
    clock: Any
    programs: dict
    members: list | None = None  # the clients whose ledger this is; None: all
    paid: str | None = None
    earlier: list | None = None

    def steps(self, rounds=None):
        """int [rounds, clients of this ledger]: the steps of the private mechanism of each in each of `rounds` [a, b), or in
        all."""
        steps = participation.steps(self.config, rounds)
        return steps if self.members is None else steps[:, self.members]

    @property
    def ledger(self):
        """Process 0's ledger; None in the others."""
        return self.storage.ledger


def check_past(job):
    """Refuse records, a base model or mechanisms that are not those of the ledger: its budget was planned for these alone."""
    if not job.ledger.charged:
        return
    for name, words in ("data", "the records are not those"), ("base", "the base model is not the one"):
        if job.ledger.charged[-1]["inputs"][name] != job.inputs[name]:
            raise InputError(
                f"{words} that {job.storage.directory} began with: restore what was there, or start a new `workdir`."
            )
    described = [ledgers.describe(mechanism) for mechanism in job.prepared.mechanisms]
    if job.ledger.begun and job.ledger.begun[-1]["clients"] != described:
        raise InputError(
            f"{job.storage.directory}/config.json has other sampling or noise than the ledger: restore it, or start a new "
            "`workdir`."
        )


def keyed_inputs(keys, base_digest, record_digest):
    """{"base", "data"}: the digests of what a run works with, keyed by all parties' secrets `keys`: a plain hash would tell whose
    records are in."""
    key, digests = b"".join(keys), {"base": base_digest, "data": record_digest}
    return {name: secrets.digest(key, "input", name, digest.hex()).hex() for name, digest in digests.items()}


def agreed_charge(job, done):
    """What process 0 charges next, for all: (rounds, attempt, the hash of the entry that pays for it, the earlier dispatches that
    its noise goes on from), or None at the end."""
    processes.at(f"charging round {done + 1}")

    def make():
        todo = charge(job, done)
        return todo and [*todo, job.ledger.head_of(job.ledger.begun[-1]), earlier(job)]

    todo = processes.agree(make)
    if todo:
        processes.once(todo[2])
    return todo and (tuple(todo[0]), *todo[1:])


def earlier(job):
    """The dispatches that the noise of the one that was charged last goes on from, by the ledger: [(rounds, attempt, hash of its
    begin entry)]."""
    if not job.prepared.rounds.local.noise.over_rounds:
        return []
    return [(entry["rounds"], entry["attempt"], job.ledger.head_of(entry)) for entry in job.ledger.block()[:-1]]


def charge(job, done, **more):
    """The next rounds [a, b) and their attempt, charged to the ledger, whose entry has `more`; None when rounds or budget are at
    their end.

    A dispatch that a crash cut off is never run again under its keys. Someone may have seen its uploads, and two transcripts
    under one set of keys, from machines that round differently, show in their difference gradients without noise. So it stays
    paid for, and a new attempt has keys of its own and is paid for too. Only with `seed`, whose noise is not secret, are the same
    rounds run again as they were. Raises InputError rather than take a client past its epsilon.
    """
    config, ledger = job.config, job.ledger
    if done >= config.schedule.rounds:
        return None
    entry = ledger.open_entry()
    if entry and entry["rounds"][0] == done + 1:
        if config.privacy.seed is not None:
            return tuple(entry["rounds"]), entry["attempt"]
        print(
            f"warning: rounds {done + 1} to {entry['rounds'][1] - 1} were lost: they stay paid for, and new noise is drawn.",
            file=sys.stderr,
        )
    last = min(done + _most_rounds(job), config.schedule.rounds)
    if config.execution.eval_every:
        last = min(last, (done // config.execution.eval_every + 1) * config.execution.eval_every)
    # Sigma is calibrated to `rounds` rounds, and beyond them the budget is spent. A party on its own agreed to no more either.
    if config.privacy.epsilon is not None or job.members is not None:
        last = min(last, budgets.affordable(job, done))
    if last <= done:
        return None
    rounds = (done + 1, last + 1)
    attempt = ledger.next_attempt(rounds)
    budgets.stay_within(job, rounds)
    more |= {"steps": job.steps(rounds).sum(0).tolist()} if participation.scheduled(config) else {}
    more |= guarantee(job)
    ledger.begin(
        rounds, attempt, job.prepared.mechanisms, trust.mode(config).steps_per_round(config), job.inputs, **more
    )
    return rounds, attempt


def guarantee(job):
    """What every entry that charges says of the run."""
    privacy = job.config.privacy
    said = {"trust": privacy.trust, "delta": privacy.delta, "release": job.description["release"] or "NO PRIVACY"}
    said["config"] = _same_config(job)
    if privacy.seed is None:
        # No other history, not even of a disk put back to an earlier state, has the keys of this one.
        said["nonce"] = os.urandom(16).hex()
    return said


def _same_config(job):
    """The digest of what the run is kept as being (config.json); InputError where the ledger was charged by another."""
    digest = job.storage.config_digest()
    if job.ledger.charged and job.ledger.charged[-1].get("config", digest) != digest:
        raise InputError(
            f"{job.storage.directory} says that its run is another than the ledger was charged by: restore its config, or start "
            "a new `workdir`."
        )
    return digest


def paid_secrets(job):
    """The clients' secrets for the dispatch that was charged last, derived from the begin entry that paid for it and from all
    before it.

    So a workdir that is put back to an earlier state, a disk's snapshot say, cannot draw them again for anything else. With
    `seed` they are the seed's alone: its noise is not secret, and is to be the same however the rounds are cut.
    """
    if job.config.privacy.seed is not None:
        return job.secrets
    paid = job.paid or job.ledger.head_of(job.ledger.begun[-1])
    return [secrets.digest(secret, "paid by", paid) for secret in job.secrets]


def round_keys(job, rounds, attempt):
    """What rounds [a, b) of the dispatch that was charged last draw from, as the noise makes it (`noise.Noise.round_keys`), and
    "joins" where not everyone takes part in each round."""
    config, prepared, numbers, parties = job.config, job.prepared, range(*rounds), paid_secrets(job)
    local, rate = prepared.rounds.local, trust.mode(config).joining(config)
    keys = local.noise.round_keys(
        parties, numbers, attempt, config.schedule.clients, rate, local, prepared.shares, prepared.state.adapter
    )
    before = [
        secrets.keys_of(paid_secrets(job._replace(paid=paid))[: config.schedule.clients], "noise", range(*of), tried)
        for of, tried, paid in (earlier(job) if job.earlier is None else job.earlier)
    ]
    keys = local.noise.going_on(keys, before)
    if config.privacy.by_unit:
        keys["rows"] = secrets.keys_of(parties[: config.schedule.clients], "rows", numbers, attempt)
    if participation.partial(config):
        keys["joins"] = participation.joins(config, parties, numbers, attempt)
    return keys


def _most_rounds(job):
    """The most rounds of a dispatch: as configured, and no more than the host's draws have room for."""
    config, local = job.config, job.prepared.rounds.local
    sent = job.description["communication"]["adapter_parameters"]
    return min(config.execution.dispatch_rounds, local.noise.most_rounds(config.schedule.clients, sent, local))


def execute(job, state, rounds, attempt):
    """Run rounds [a, b) as one call of the compiled program, or round by round where records are streamed -> (state, (private,
    valid) that they show, seconds of running them)."""
    p = job.prepared
    processes.at(f"rounds {rounds[0]} to {rounds[1] - 1}")
    keys = round_keys(job, rounds, attempt)
    parts, total = [], 0.0
    for placed, length, waited in streaming.calls(p, keys, rounds[1] - rounds[0]):
        state, shown, seconds = _call(job, state, placed, length)
        total += waited + seconds  # what is waited for is part of the round
        parts.append(mesh.fetch(shown))
    return state, jax.tree.map(lambda *x: np.concatenate(x), *parts), total


def _call(job, state, keys, length):
    """One call of the program of `length` rounds, compiled if it is the first -> (state, (private, valid), seconds)."""
    p = job.prepared
    arguments = (state, p.params, p.placement.clients, p.placement.data, keys)
    diagnostics = job.config.execution.private_diagnostics
    with job.clock.part("compiling"):
        program = compiled(job.programs, job.config, p.rounds, p.mesh, arguments, diagnostics=diagnostics)
    start = time.perf_counter()
    with job.clock.part("rounds"):
        state, (_, private, valid) = jax.block_until_ready(program(*arguments))
    return state, (private, valid), time.perf_counter() - start


def compiled(programs, config, rounds, mesh, arguments, **shown):
    """The program of `round.make(rounds, mesh, **shown)` for `arguments`, kept in `programs` (a dict)."""
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments))
    key = (program_of(config, rounds, mesh), tuple(shown.items()), shapes)
    if key not in programs:
        programs[key] = round.make(rounds, mesh, **shown).lower(*arguments).compile()
    return programs[key]


def program_of(config, rounds, mesh):
    """All that the compiled rounds are made of, but the shapes of their arguments: jobs with the same can share them."""
    fields = {
        name: held
        for name, held in to_flat(config).items()
        if FIELDS[name].section in BUILT_OF and name not in ARGUMENTS
    }
    return (
        rounds.model,
        _comparable(rounds.loss),
        rounds.local,
        rounds.rule,
        rounds.rows,
        rounds.wave,
        mesh,
        tuple(fields.items()),
    )


def _comparable(loss):
    """`loss` as what equals another that was made alike: a functools.partial equals itself alone."""
    if not isinstance(loss, functools.partial):
        return loss
    return loss.func, tuple(map(_comparable, loss.args)), tuple(sorted(loss.keywords.items()))


def commit(job, done, state, lines, shown, charged):
    """Make the dispatch durable, then say so in the ledger, and only then release its metrics. The checkpoint anchors the ledger
    as it stands, the dispatch's own begin entry included."""
    processes.at(f"the checkpoint of round {done}")
    job.storage.save(done, state, {"lines": lines, "ledger": job.ledger.anchor if job.ledger else None})
    if processes.primary():
        _commit(job, lines, shown, charged)
    processes.meet()  # no process may show the rounds before the ledger has them


def _commit(job, lines, shown, charged):
    job.ledger.commit(*charged)
    job.storage.release(lines)
    if shown[0] is not None:
        job.storage.keep_private(
            {"round": number}
            | {name: value[index][: job.config.schedule.clients].tolist() for name, value in shown[0].items()}
            for index, number in enumerate(range(*charged[0]))
        )
