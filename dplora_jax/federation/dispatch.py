"""One dispatch of rounds after another: charged to the ledger, run, saved, committed, and only then shown.

`job` is a `run.Run`.
"""

import os
import sys
import time

import jax
import numpy as np

from dplora_jax import private_files
from dplora_jax.errors import InputError
from dplora_jax.federation import mesh, participants, processes, randomness, round, streaming, workdir
from dplora_jax.files import to_json
from dplora_jax.privacy import ledger as ledgers
from dplora_jax.privacy import secrets
from experiments import tensorboard


def restore(job):
    """(rounds done, state, metrics lines) from the newest checkpoint, or from the base model, which is evaluated and saved."""
    processes.at("the newest checkpoint")
    restored = job.checkpoints.restore(job.prepared.state)
    if restored is None:
        line = {
            "round": 0,
            "epsilon": [0.0] * job.config.schedule.clients,
            "epsilon_max": 0.0,
            "seconds": 0.0,
            "bytes_up_per_client": 0,
            "bytes_down_per_client": 0,
        }
        with job.clock.busy():
            line |= job.prepared.evaluate(job.prepared.state, ends=True)
        anchor = job.ledger.anchor if job.ledger else None  # process 0 writes the notes
        state, done, notes = job.prepared.state, 0, {"lines": [line], "ledger": anchor}
        job.checkpoints.save(0, state, notes)
        job.checkpoints.wait(processes.meet)
    else:
        done, state, notes = restored
    if not processes.primary():
        return done, state, notes["lines"]
    entry = job.ledger.open_entry()
    if entry and entry["rounds"][1] - 1 <= done:  # killed between the checkpoint and its commit
        job.ledger.commit(entry["rounds"], entry["attempt"])
    workdir.write_metrics(job.folder, notes["lines"])
    return done, state, notes["lines"]


def check_past(job):
    """Refuse records, a base model or mechanisms that are not those of the ledger: its budget was planned for these alone."""
    if not job.ledger.begun:
        return
    last = job.ledger.begun[-1]
    for name, words in ("data", "the records are not those"), ("base", "the base model is not the one"):
        if last["inputs"][name] != _keyed_inputs(job)[name]:
            raise InputError(f"{words} that {job.folder} began with: restore what was there, or start a new `workdir`.")
    if last["clients"] != [ledgers.describe(mechanism) for mechanism in job.prepared.mechanisms]:
        raise InputError(
            f"{job.folder}/config.json has other sampling or noise than the ledger: restore it, or start a new `workdir`."
        )


def _keyed_inputs(job):
    """The inputs' digests under the run's secrets: a plain hash would tell whose records are in."""
    key = b"".join(job.secrets)
    return {
        name: secrets.digest(key, "input", name, digest.hex()).hex() for name, digest in job.prepared.inputs.items()
    }


def agreed_charge(job, done):
    """What process 0 charges next, for all: (rounds, attempt, the hash of the entry that pays for it), or None at the end."""
    processes.at(f"charging round {done + 1}")

    def make():
        todo = charge(job, done)
        return todo and [*todo, job.ledger.head_of(job.ledger.begun[-1])]

    todo = processes.agree(make)
    if todo:
        processes.once(todo[2])
    return todo and (tuple(todo[0]), *todo[1:])


def charge(job, done):
    """The next rounds [a, b) and their attempt, charged to the ledger; None when rounds or budget are at their end.

    A dispatch that a crash cut off is never run again under its keys. Someone may have seen its uploads, and two transcripts
    under one set of keys, from machines that round differently, show in their difference gradients without noise. So it stays
    paid for, and a new attempt has keys of its own and is paid for too. Only with `seed`, whose noise is no secret, are the same
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
    if config.privacy.epsilon is not None:  # sigma is calibrated to `rounds` rounds: beyond them the budget is spent
        last = min(last, _affordable(job, done))
    if last <= done:
        return None
    rounds = (done + 1, last + 1)
    attempt = ledger.next_attempt(rounds)
    _stay_within(job, rounds)
    more = {"steps": participants.steps(config, rounds).sum(0).tolist()} if participants.scheduled(config) else {}
    more |= {
        "trust": config.privacy.trust,
        "delta": config.privacy.delta,
        "release": job.prepared.facts["release"] or "NO PRIVACY",
    }
    more["config"] = (ledger.begun[-1] if ledger.begun else {}).get("config") or workdir.digest(job.folder)
    if (
        config.privacy.seed is None
    ):  # no other history, not even of a disk put back to an earlier state, has the keys of this one
        more["nonce"] = os.urandom(16).hex()
    ledger.begin(rounds, attempt, job.prepared.mechanisms, config.steps_per_round, _keyed_inputs(job), **more)
    return rounds, attempt


def _stay_within(job, rounds):
    """Refuse rounds that would take a client past its epsilon, by what the ledger would then say."""
    config = job.config
    if config.privacy.epsilon is None:
        return
    mechanisms = [ledgers.describe(mechanism) for mechanism in job.prepared.mechanisms]
    planned = {"rounds": rounds, "clients": mechanisms, "local_steps": config.steps_per_round}
    planned["steps"] = participants.steps(config, rounds).sum(0).tolist()
    spent = max(job.ledger.epsilons(config.privacy.delta, [planned]))
    if spent > config.privacy.epsilon:
        raise InputError(
            f"rounds {rounds[0]} to {rounds[1] - 1} would take a client to epsilon {spent:.4g}, past {config.privacy.epsilon:g}; "
            "start a new `workdir`."
        )


def _affordable(job, done):
    """The last round that no client has to pay more for than was planned: lost attempts have been paid for too."""
    config = job.config
    if not participants.scheduled(config):
        return done + config.schedule.rounds - job.ledger.charged_rounds()
    left = participants.steps(config).sum(0) - job.ledger.charged_steps(config.schedule.clients)
    needed = np.cumsum(participants.steps(config, (done + 1, config.schedule.rounds + 1)), 0)
    return done + int(np.logical_and.accumulate((needed <= left).all(1)).sum())


def paid_secrets(job):
    """The clients' secrets for the dispatch that was charged last, derived from the begin entry that paid for it and from all
    before it.

    So a workdir that is put back to an earlier state, a disk's snapshot say, cannot draw them again for anything else. With
    `seed` they are the seed's alone: its noise is no secret, and is to be the same however the rounds are cut.
    """
    if job.config.privacy.seed is not None:
        return job.secrets
    paid = job.paid or job.ledger.head_of(job.ledger.begun[-1])
    return [secrets.digest(secret, "paid by", paid) for secret in job.secrets]


def round_keys(job, rounds, attempt):
    """What the dispatch that was charged last draws from (`randomness.of_rounds`)."""
    return randomness.of_rounds(job.config, job.prepared, paid_secrets(job), rounds, attempt)


def _most_rounds(job):
    """The most rounds of a dispatch: as flagged, and no more than the host's draws have room for."""
    config, local = job.config, job.prepared.federation.local
    sent = job.prepared.facts["communication"]["adapter_parameters"]
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
    if length not in job.programs:
        program = round.make(p.federation, p.mesh, diagnostics=job.config.execution.private_diagnostics)
        with job.clock.busy():
            job.programs[length] = program.lower(*arguments).compile()
    start = time.perf_counter()
    with job.clock.busy():
        state, (_, private, valid) = jax.block_until_ready(job.programs[length](*arguments))
    return state, (private, valid), time.perf_counter() - start


def commit(job, done, state, lines, shown, begun):
    """Make the dispatch durable, then say so in the ledger, and only then release its metrics. The checkpoint anchors the ledger
    as it stands, the dispatch's own begin entry included."""
    processes.at(f"the checkpoint of round {done}")
    job.checkpoints.save(done, state, {"lines": lines, "ledger": job.ledger.anchor if job.ledger else None})
    job.checkpoints.wait(processes.meet)
    if not processes.primary():
        return
    job.ledger.commit(*begun)
    show_metrics(job, lines)
    if shown[0] is not None:
        _write_diagnostics(job, begun[0], shown[0])


def show_metrics(job, lines):
    """Release the metrics `lines`, also to TensorBoard where that is asked for."""
    workdir.write_metrics(job.folder, lines)
    if job.config.output.tensorboard:
        tensorboard.write(job.folder)


def _write_diagnostics(job, rounds, shown):
    """Append exact private statistics to private/diagnostics.jsonl, labelled as what they are."""
    private = job.folder / "private"
    private.mkdir(mode=private_files.FOLDER_MODE, exist_ok=True)
    rows = [
        {"round": number, "note": private_files.NOTE}
        | {name: value[index][: job.config.schedule.clients].tolist() for name, value in shown.items()}
        for index, number in enumerate(range(*rounds))
    ]
    with open(os.open(private / "diagnostics.jsonl", os.O_RDWR | os.O_CREAT, private_files.MODE), "r+b") as file:
        # Behind the last whole line: a kill or a full disk may have cut one off.
        file.seek(file.read().rfind(b"\n") + 1)
        file.truncate()
        file.write("".join(to_json(row) + "\n" for row in rows).encode())
