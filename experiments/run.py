"""The main job: a private federation fine-tunes a language model. `python -m experiments.run --flagfile=finance.flags`.

Run again in the same workdir, it goes on where it was; exit codes are 0 done, 2 bad input, 75 stopped by SIGTERM with
everything saved.
"""

import os
import pathlib
import signal
import sys
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
    from dplora_jax import checkpoint
    from dplora_jax.privacy import ledger as ledgers
    from dplora_jax.privacy import secrets
    from experiments import summary, trust_modes, workdir

    stored = workdir.stored_config(folder, config)
    ledger = ledgers.Ledger(folder / ledgers.FILE)
    for name, anchor in checkpoint.anchors(folder / "checkpoints"):
        ledger.check(anchor, name)
    if ledger.ended:
        seeded = config.seed is not None
        parties = trust_modes.parties(config)
        held = secrets.from_seed(config.seed, parties) if seeded else secrets.load(folder / "private")
        if held:  # an end that someone else wrote must not cost the secrets
            ledger.seal_with(b"".join(held))
        secrets.destroy(folder / "private")
        print(f"This run is finished, nothing was done. {summary.line(folder)}")
        return 0
    from experiments import setup

    if not (folder / "private" / secrets.FILE).exists() and ledger.entries and config.seed is None:
        raise InputError(
            f"{folder} has a ledger but its secrets are gone: its noise cannot go on; start a new --workdir."
        )
    prepared = setup.prepare(config, stored)
    if stored is None:
        workdir.write_config(folder, config, prepared.facts | {"command": command})
    if not ledger.entries:  # nothing ran under secrets that an earlier start left, or nothing tells what did
        secrets.destroy(folder / "private")
    keys = (
        secrets.load_or_create(folder / "private", trust_modes.parties(config))
        if config.seed is None
        else secrets.from_seed(config.seed, trust_modes.parties(config))
    )
    ledger.seal_with(b"".join(keys))
    ledger.promise()
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
    try:
        code = train(Run(config, folder, prepared, ledger, checkpoints, keys, {}))
    finally:
        checkpoints.close()
    if code == 0:
        print(summary.line(folder))
    return code


def train(job):
    """Dispatch after dispatch until the rounds, or the budget, are at their end -> exit code."""
    from experiments import dispatch, progress

    dispatch.check_past(job)
    stop = _on_sigterm()
    done, state, lines = dispatch.restore(job)
    with progress.bar(job.config.rounds, done) as show:
        while not stop and (todo := dispatch.charge(job, done, state)) is not None:
            rounds, attempt = todo
            state, shown, seconds = dispatch.execute(job, state, rounds, attempt)
            done = rounds[1] - 1
            fresh = dispatch.metrics(job, rounds, attempt, seconds, shown)
            if len(state.clip_norms):
                fresh[-1]["clip_norm"] = state.clip_norms.tolist()  # public: it follows from released counts
            if job.config.eval_every and (done % job.config.eval_every == 0 or done == job.config.rounds):
                fresh[-1] |= job.prepared.evaluate(state)
            lines = [*lines, *fresh]
            dispatch.commit(job, done, state, lines, shown, (rounds, attempt))
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


def _settled(job, state, lines):
    """The lines with the last one as the ledger has it: evaluated, and charged with every attempt that was begun."""
    last = dict(lines[-1])
    if job.config.eval_every and "accuracy" not in last:
        last |= job.prepared.evaluate(state)
    if job.config.private:
        last["epsilon"] = job.ledger.epsilons(job.config.delta)
        last["epsilon_max"] = max(last["epsilon"])
    return [*lines[:-1], last]


def _finish(job, done, state, lines):
    """Settle the last line, write adapter and report, close the ledger, destroy the secrets; say which rounds did not run."""
    from dplora_jax.models import pretrained
    from dplora_jax.privacy import chain, secrets
    from experiments import model_card, released, report, summary, workdir

    workdir.write_metrics(job.folder, _settled(job, state, lines))
    p, model, base = job.prepared, job.prepared.model, pretrained.hub_id(job.config.model)
    released.save(job.folder / "adapter", job.config, model, p.params, p.lora_config, state, base)
    note = model_card.of_adapter(model, summary.line(job.folder))
    chain.replace_durably(job.folder / "adapter" / "README.md", note)
    report.write(job.folder)
    if done < job.config.rounds:
        missing = f"rounds {done + 1} to {job.config.rounds} were not run"
        print(f"The budget ended early: {missing}, since a lost attempt had to be paid for.")
    job.ledger.append(entry="end", round=done)
    secrets.destroy(job.folder / "private")


if __name__ == "__main__":
    sys.exit(main())
