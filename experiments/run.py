"""The main job: a private federation fine-tunes a language model. `python -m experiments.run --flagfile=finance.flags`.

Run again in the same workdir, it goes on where it was. Exit codes are 0 done; 2 bad input; 65 no number is finite any more
(`finite`); 74 a file cannot be read or written (`errors.storage`); 75 stopped by SIGTERM with everything saved; 69
(`processes.LOST`) another process of the run was lost.
"""

import contextlib
import pathlib
import signal
import sys
from typing import Any, NamedTuple

from dplora_jax.errors import InputError
from experiments import allocator, exits

STOPPED = 75


def main(argv=None):
    """Run the command line `argv` (default: this process's) -> exit code."""
    from dplora_jax import guard, private_files
    from dplora_jax.federation import processes
    from experiments import cli

    guard.begin(processes.primary)
    arguments = sys.argv[1:] if argv is None else argv
    folder = None
    try:
        config = cli.parse(arguments)
        processes.join(config)
        with _workdir(config) as folder, private_files.reasons_in(folder):
            code = run(config, folder, " ".join(["python -m experiments.run", *arguments]))
            processes.leave(code)
            return code
    except Exception as error:
        if processes.count() > 1:
            processes.fail(exits.known(error, folder) or error)  # ends them all
        return exits.told(error, folder)


def _workdir(config):
    """The working directory, as a context: process 0 alone writes there (but for its part of a checkpoint), and holds it."""
    from dplora_jax.federation import processes, workdir

    return (
        workdir.locked(config.output.workdir)
        if processes.primary()
        else contextlib.nullcontext(pathlib.Path(config.output.workdir))
    )


class Run(NamedTuple):
    """A run under way: its configuration, folder, prepared parts and what it writes to. Only process 0 has the ledger; `paid`
    is the hash of the entry that paid for the dispatch under way (None: the ledger's last)."""

    config: Any
    folder: pathlib.Path
    prepared: Any
    ledger: Any
    checkpoints: Any
    secrets: list
    programs: dict
    clock: Any
    paid: str | None = None


def run(config, folder, command):
    """Start, resume or find finished the run of `folder` -> exit code."""
    from dplora_jax import checkpoint
    from dplora_jax.federation import description, processes, workdir
    from dplora_jax.finetuning import setup
    from experiments import progress, summary

    opened = []  # process 0's ledger

    def look():
        stored = workdir.stored_config(folder, config)
        opened.append(_open(config, folder))
        return {"finished": opened[0].ended, "stored": workdir.charged_config(folder, stored, opened[0])}

    found = processes.agree(look)
    if found["finished"]:
        if processes.primary():
            print(f"This run is finished, nothing was done. {summary.line(folder)}")
        return 0
    prepared = setup.prepare(config, found["stored"])
    ledger = opened[0] if opened else None
    if processes.primary() and found["stored"] is None:
        told = prepared.facts | description.of_base(config) | {"command": command}
        workdir.write_config(folder, config, told)
    keys = _secrets(config, folder, ledger)
    if ledger is not None:
        ledger.seal_with(b"".join(keys))
        ledger.promise()
    prepared = setup.with_records(prepared, keys)
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
    try:
        code = train(Run(config, folder, prepared, ledger, checkpoints, keys, {}, progress.Clock()))
    finally:
        if processes.count() == 1 or sys.exc_info()[0] is None:  # closing waits for the others, who may be gone
            checkpoints.close()
    if code == 0 and processes.primary():
        print(summary.line(folder))
    return code


def _open(config, folder):
    """The checked ledger of `folder`; a finished one's secrets are destroyed."""
    from dplora_jax import checkpoint
    from dplora_jax.federation import trust_modes
    from dplora_jax.privacy import ledger as ledgers
    from dplora_jax.privacy import secrets

    ledger = ledgers.Ledger(folder / ledgers.FILE)
    for name, anchor in checkpoint.anchors(folder / "checkpoints"):
        ledger.check(anchor, name)
    if ledger.ended:
        seeded = config.privacy.seed is not None
        parties = trust_modes.mode(config).parties(config)
        held = secrets.from_seed(config.privacy.seed, parties) if seeded else secrets.load(folder / "private")
        if held:  # an end that someone else wrote must not cost the secrets
            ledger.seal_with(b"".join(held))
        secrets.destroy(folder / "private")
    elif not (folder / "private" / secrets.FILE).exists() and ledger.entries and config.privacy.seed is None:
        raise InputError(
            f"{folder} has a ledger but its secrets are gone: its noise cannot go on; start a new --workdir."
        )
    return ledger


def _secrets(config, folder, ledger):
    """The clients' secrets: process 0 makes them where there are none, the others read its file."""
    from dplora_jax.federation import processes, trust_modes
    from dplora_jax.privacy import secrets

    parties, made = trust_modes.mode(config).parties(config), None
    if processes.primary():
        if not ledger.entries:  # nothing ran under secrets that an earlier start left, or nothing tells what did
            secrets.destroy(folder / "private")
        made = secrets.load_or_create(folder / "private", parties) if config.privacy.seed is None else None
    processes.meet()
    if config.privacy.seed is not None:
        return secrets.from_seed(config.privacy.seed, parties)
    held = made or secrets.load(folder / "private")
    if held is None:
        raise InputError(
            f"{folder}/private has no secrets that this process can read: --workdir must be one shared folder for all."
        )
    return held


def train(job):
    """Dispatch after dispatch until the rounds, or the budget, are at their end -> exit code."""
    from dplora_jax.federation import dispatch, finite, processes, round_lines
    from experiments import progress

    processes.agree(lambda: dispatch.check_past(job))
    stop = _on_sigterm()
    done, state, lines = dispatch.restore(job)
    with progress.bar(job.config.schedule.rounds, done, None if processes.primary() else True) as show:
        while True:
            finite.check(state, lines, job.prepared.probe)
            stopped = processes.any_of(stop)
            if stopped or (todo := dispatch.agreed_charge(job, done)) is None:
                break
            *(rounds, attempt), paid = todo
            job = job._replace(paid=paid)
            state, shown, seconds = dispatch.execute(job, state, rounds, attempt)
            done = rounds[1] - 1
            fresh = round_lines.of_dispatch(job, rounds, attempt, seconds, shown)
            if len(state.clip_norms):
                fresh[-1]["clip_norm"] = state.clip_norms.tolist()  # public: it follows from released counts
            if job.config.execution.eval_every and (
                done % job.config.execution.eval_every == 0 or done == job.config.schedule.rounds
            ):
                with job.clock.busy():
                    fresh[-1] |= job.prepared.evaluate(state, ends=done == job.config.schedule.rounds)
            lines = [*lines, *fresh]
            dispatch.commit(job, done, state, lines, shown, (rounds, attempt))
            show(done, fresh[-1])
    if stopped and done < job.config.schedule.rounds:
        return STOPPED
    if processes.primary():
        print(job.clock.line())
    _finish(job, done, state, lines)
    return 0


def _on_sigterm():
    """A list that SIGTERM makes non-empty: the dispatch under way is finished and saved first."""
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    return stop


def _settled(job, done, state, lines):
    """The lines with the last one as the ledger has it: evaluated, and charged with every attempt that was begun."""
    from experiments import report_text

    last = dict(lines[-1])
    evaluated = any(name in last for name in report_text.METRICS)  # not where --eval_every was 0 until this start
    if job.config.execution.eval_every and not (evaluated and done == job.config.schedule.rounds):
        last |= job.prepared.evaluate(state, ends=True)
    if job.config.privacy.private and job.ledger is not None:
        last["epsilon"] = job.ledger.epsilons(job.config.privacy.delta)
        last["epsilon_max"] = max(last["epsilon"])
    return [*lines[:-1], last]


def _finish(job, done, state, lines):
    """Settle the last line, write adapter and report, close the ledger, destroy the secrets; say which rounds did not run."""
    from dplora_jax.federation import dispatch, final_adapter, finite, processes
    from dplora_jax.models import pretrained
    from dplora_jax.privacy import chain, secrets
    from experiments import model_card, report, summary

    p, lines = job.prepared, _settled(job, done, state, lines)
    finite.check(state, lines, p.probe)
    parts = final_adapter.fetched(job.config, p.params, state)
    if not processes.primary():
        return
    dispatch.show_metrics(job, lines)
    model, base = p.model, pretrained.hub_id(job.config.base.name)
    final_adapter.save(job.folder / "adapter", job.config, model, p.lora_config, parts, base)
    labels = p.facts["data"]["labels"]
    for folder, note in model_card.of_adapters(job.config, model, summary.line(job.folder), labels):
        chain.replace_durably(job.folder / "adapter" / folder / "README.md", note)
    report.write(job.folder)
    if done < job.config.schedule.rounds:
        missing = f"rounds {done + 1} to {job.config.schedule.rounds} were not run"
        print(f"The budget ended early: {missing}, since rounds that were lost stay paid for.")
    job.ledger.append(entry="end", round=done)
    secrets.destroy(job.folder / "private")


if __name__ == "__main__":
    allocator.keep_freed_memory()
    sys.exit(main())
