"""The main job: a private federation fine-tunes a language model. `python -m experiments.run --flagfile=finance.flags`.

Run again in the same workdir, it goes on where it was; exit codes are 0 done, 2 bad input, 75 stopped by SIGTERM with
everything saved.
"""

import json
import os
import pathlib
import signal
import sys
import time
import warnings
from typing import Any, NamedTuple

from dplora_jax.errors import InputError

STOPPED = 75


def main(argv=None):
    """Run the command line `argv` (default: this process's) -> exit code."""
    from experiments import flags, workdir

    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    arguments = sys.argv[1:] if argv is None else argv
    try:
        config = flags.parse(arguments)
        with workdir.locked(config.workdir) as folder:
            return run(config, folder, " ".join(["python -m experiments.run", *arguments]))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


class Run(NamedTuple):
    """A run under way: its configuration, folder, prepared parts and what it writes to."""

    config: Any
    folder: pathlib.Path
    prepared: Any
    ledger: Any
    checkpoints: Any
    secrets: list
    programs: dict


def run(config, folder, command):
    """Start, resume or find finished the run of `folder` -> exit code."""
    from dplora_jax.privacy import ledger as ledgers
    from dplora_jax.privacy import secrets
    from experiments import summary, workdir

    stored = workdir.stored_config(folder, config)
    ledger = ledgers.Ledger(folder / "privacy_ledger.jsonl")
    if ledger.ended:
        secrets.destroy(folder / "private")
        print(f"This run is finished, nothing was done. {summary.line(folder)}")
        return 0
    from dplora_jax.checkpoint import Checkpoints
    from experiments import setup

    if not (folder / "private" / secrets.FILE).exists() and ledger.entries and config.seed is None:
        raise InputError(
            f"{folder} has a ledger but its secrets are gone: its noise cannot go on; start a new --workdir."
        )
    prepared = setup.prepare(config, stored)
    if stored is None:
        workdir.write_config(folder, config, prepared.facts | {"command": command})
    keys = (
        secrets.load_or_create(folder / "private", config.clients)
        if config.seed is None
        else secrets.from_seed(config.seed, config.clients)
    )
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        code = train(Run(config, folder, prepared, ledger, checkpoints, keys, {}))
    finally:
        checkpoints.close()
    if code == 0:
        print(summary.line(folder))
    return code


def train(job):
    """Dispatch after dispatch until the rounds, or the budget, are at their end -> exit code."""
    from experiments import progress

    _check_records(job)
    stop = _on_sigterm()
    done, state, lines = _restore(job)
    with progress.bar(job.config.rounds, done) as show:
        while not stop and (todo := _next_dispatch(job, done)) is not None:
            rounds, attempt = todo
            state, shown, seconds = _dispatch(job, state, rounds, attempt)
            done = rounds[1] - 1
            fresh = _lines(job, rounds, seconds)
            if len(state.clip_norms):
                fresh[-1]["clip_norm"] = state.clip_norms.tolist()  # public: it follows from released counts
            if job.config.eval_every and (done % job.config.eval_every == 0 or done == job.config.rounds):
                fresh[-1] |= job.prepared.evaluate(_released(job, state))
            lines = [*lines, *fresh]
            _commit(job, done, state, lines, shown, (rounds, attempt))
            show(done, fresh[-1])
    if stop and done < job.config.rounds:
        return STOPPED
    _finish(job, done, state, lines)
    return 0


def _on_sigterm():
    """A list that SIGTERM makes non-empty: the dispatch under way is finished and saved first."""
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    return stop


def _restore(job):
    """(rounds done, state, metrics lines) from the newest checkpoint, or from the base model, which is evaluated and saved."""
    from experiments import workdir

    restored = job.checkpoints.restore(job.prepared.state)
    if restored is None:
        line = {
            "round": 0,
            "epsilon": [0.0] * job.config.clients,
            "epsilon_max": 0.0,
            "seconds": 0.0,
            "bytes_up_per_client": 0,
            "bytes_down_per_client": 0,
        }
        state, done, notes = (
            job.prepared.state,
            0,
            {"lines": [line | job.prepared.evaluate(job.prepared.state.adapter)]},
        )
        job.checkpoints.save(0, state, notes)
        job.checkpoints.wait()
    else:
        done, state, notes = restored
    entry = job.ledger.open_entry()
    if entry and entry["rounds"][1] - 1 <= done:  # killed between the checkpoint and its commit
        job.ledger.commit(entry["rounds"], entry["attempt"])
    workdir.write_metrics(job.folder, notes["lines"])
    return done, state, notes["lines"]


def _check_records(job):
    """Refuse records that are not those of the ledger: its budget was planned for these alone."""
    last = job.ledger.last_begun
    if last and last["records"] != _keyed(job, "records"):
        raise InputError(
            f"the records are not those that {job.folder} began with: restore them, or start a new --workdir."
        )


def _keyed(job, name):
    """A digest of the prepared parts, keyed with the run's secrets: a plain hash would tell whose records are in."""
    from dplora_jax.privacy import secrets

    return secrets.digest(b"".join(job.secrets), name, getattr(job.prepared, name).hex()).hex()


def _next_dispatch(job, done):
    """The next rounds [a, b) and their attempt, charged to the ledger; None when rounds or budget are at their end.

    A dispatch that was begun and not committed is replayed under its own keys, and not charged again, if everything that
    feeds the mechanism is the same; else a new attempt's keys are drawn and both are paid for.
    """
    config, ledger = job.config, job.ledger
    if done >= config.rounds:
        return None
    entry, fingerprint = ledger.open_entry(), _keyed(job, "fingerprint")
    if entry and entry["rounds"][0] == done + 1 and entry["fingerprint"] == fingerprint:
        return tuple(entry["rounds"]), entry["attempt"]
    last = min(done + _most_rounds(job), config.rounds)
    if config.eval_every:
        last = min(last, (done // config.eval_every + 1) * config.eval_every)
    if config.epsilon is not None:  # sigma is calibrated to `rounds` rounds: beyond them the budget is spent
        last = min(last, done + config.rounds - ledger.charged_rounds())
    if last <= done:
        return None
    rounds = (done + 1, last + 1)
    attempt = ledger.next_attempt(rounds)
    more = {"records": _keyed(job, "records"), "release": job.prepared.facts["release"] or "NO PRIVACY"}
    ledger.begin(rounds, attempt, job.prepared.mechanisms, config.local_steps, fingerprint, **more)
    return rounds, attempt


def _dispatch(job, state, rounds, attempt):
    """Run rounds [a, b) as one call of the compiled program -> (state, what it shows, seconds of running it)."""
    import jax

    from dplora_jax.federation import mesh, round

    p = job.prepared
    keys = mesh.place_keys(p.mesh, _randomness(job, rounds, attempt), p.placement.clients.size.shape[0])
    arguments = (state, p.params, p.placement.clients, p.placement.data, keys)
    length = rounds[1] - rounds[0]
    if length not in job.programs:
        program = round.make(p.federation, p.mesh, diagnostics=job.config.private_diagnostics)
        job.programs[length] = program.lower(*arguments).compile()
    start = time.perf_counter()
    state, (_, private) = jax.block_until_ready(job.programs[length](*arguments))
    return state, private, time.perf_counter() - start


def _randomness(job, rounds, attempt):
    """What rounds [a, b) draw from: keys, or with hardened noise the host's own draws."""
    from dplora_jax.privacy import host_noise, secrets

    p, local = job.prepared, job.prepared.federation.local
    if local.bits is None:
        return secrets.round_keys(job.secrets, range(*rounds), attempt)
    stds = [m.noise_multiplier * 2.0**local.bits for m in p.mechanisms]
    return host_noise.round_draws(
        job.secrets, range(*rounds), attempt, local.local_steps, p.state.adapter, stds, local.records
    )


def _most_rounds(job):
    """The most rounds of a dispatch: as flagged, and no more than the host's draws have room for."""
    from dplora_jax.privacy import host_noise

    config, local = job.config, job.prepared.federation.local
    if local.bits is None:
        return config.dispatch_rounds
    sent = job.prepared.facts["communication"]["adapter_parameters"]
    return min(config.dispatch_rounds, host_noise.most_rounds(config.clients, config.local_steps, sent, local.records))


def _lines(job, rounds, seconds):
    """The metrics lines of rounds [a, b): everything in them is public."""
    from dplora_jax.privacy import accounting

    config, sent = job.config, job.prepared.facts["communication"]
    length = rounds[1] - rounds[0]
    before = job.ledger.charged_rounds() - length  # paid for before this dispatch, lost attempts included
    inner = tuple((before + i) * config.local_steps for i in range(1, length))
    outer = ((before + length) * config.local_steps,)
    curves = {
        m: accounting.epsilon_curve(m, inner, config.delta, 1e-2) + accounting.epsilon_curve(m, outer, config.delta)
        for m in set(job.prepared.mechanisms)
    }
    lines = []
    for index in range(length):
        spent = [curves[m][index] for m in job.prepared.mechanisms]
        rate = length * config.local_steps * sum(m.sampling_rate * m.records for m in job.prepared.mechanisms) / seconds
        lines.append(
            {
                "round": rounds[0] + index,
                "epsilon": spent,
                "epsilon_max": max(spent),
                "seconds": seconds / length,
                "examples_per_second": rate,
                "release": job.prepared.facts["release"] or "NO PRIVACY",
                "bytes_up_per_client": sent["bytes_up_per_client_per_round"],
                "bytes_down_per_client": sent["bytes_down_per_client_per_round"],
            }
        )
    return lines


def _commit(job, done, state, lines, shown, begun):
    """Make the dispatch durable, then say so in the ledger, and only then release its metrics."""
    from experiments import workdir

    job.checkpoints.save(done, state, {"lines": lines})
    job.checkpoints.wait()
    job.ledger.commit(*begun)
    workdir.write_metrics(job.folder, lines)
    if shown is not None:
        _write_diagnostics(job, begun[0], shown)


def _write_diagnostics(job, rounds, shown):
    """Append exact private statistics to private/diagnostics.jsonl, labelled as what they are."""
    private = job.folder / "private"
    private.mkdir(mode=0o700, exist_ok=True)
    with open(os.open(private / "diagnostics.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as file:
        for index, number in enumerate(range(*rounds)):
            values = {name: value[index][: job.config.clients].tolist() for name, value in shown.items()}
            file.write(
                json.dumps(
                    {
                        "round": number,
                        "note": "PRIVATE: exact statistics of the records, outside the guarantee",
                        **values,
                    }
                )
                + "\n"
            )


def _released(job, state):
    """The adapter that metrics and files speak of: the average where there is one."""
    return state.average.mean if job.config.ema else state.adapter


def _settled(job, state, lines):
    """The lines with the last one as the ledger has it: evaluated, and charged with every attempt that was begun."""
    last = dict(lines[-1])
    if job.config.eval_every and "accuracy" not in last:
        last |= job.prepared.evaluate(_released(job, state))
    if job.config.private:
        last["epsilon"] = job.ledger.epsilons(job.config.delta)
        last["epsilon_max"] = max(last["epsilon"])
    return [*lines[:-1], last]


def _finish(job, done, state, lines):
    """Settle the last line, write adapter and report, close the ledger, destroy the secrets; say which rounds did not run."""
    import jax

    from dplora_jax import lora, peft
    from dplora_jax.privacy import secrets
    from experiments import report, summary, workdir

    workdir.write_metrics(job.folder, _settled(job, state, lines))
    adapter = lora.with_frozen_a(job.prepared.params, _released(job, state))
    peft.save(job.folder / "adapter", job.prepared.model, jax.device_get(adapter), job.prepared.lora_config)
    workdir.write_atomically(job.folder / "adapter" / "README.md", f"# LoRA adapter\n\n{summary.line(job.folder)}\n")
    report.write(job.folder)
    if done < job.config.rounds:
        missing = f"rounds {done + 1} to {job.config.rounds} were not run"
        print(f"The budget ended early: {missing}, since a lost attempt had to be paid for.")
    job.ledger.append(entry="end", round=done)
    secrets.destroy(job.folder / "private")


if __name__ == "__main__":
    sys.exit(main())
