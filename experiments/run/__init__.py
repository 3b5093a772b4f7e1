"""The main job: a private federation fine-tunes a language model. `python -m experiments.run --flagfile=finance.flags`.

Run again in the same workdir, it goes on where it was. Exit codes are 0 done; 2 bad input; 65 no number is finite any more
(`finite`); 74 a file cannot be read or written (`errors.storage`); 75 stopped by SIGTERM with everything saved; 69
(`processes.LOST`) another process of the run was lost.
"""

import signal
import sys

from experiments.cli import exits

STOPPED = 75


def main(argv=None):
    """Run the command line `argv` (default: this process's) -> exit code."""
    from dplora_jax.federation.clock import Clock

    clock = Clock()
    with clock.part("starting"):
        from dplora_jax import guard, private_files
        from dplora_jax.federation import processes, storage
        from experiments import cli

    guard.begin(processes.primary, cli.as_flags)
    arguments = sys.argv[1:] if argv is None else argv
    folder = None
    try:
        config = cli.parse(arguments)
        code = processes.join(config)
        if code is not None:  # of the supervisor of the process that did the work
            return code
        with storage.open_workdir(config.output.workdir, config) as workdir:
            folder = workdir.directory
            with private_files.reasons_in(folder):
                code = run(config, workdir, " ".join(["python -m experiments.run", *arguments]), clock)
                processes.leave(code)
                return code
    except Exception as error:
        processes.fail(exits.known(error, folder) or error)  # where there are several, ends them all
        return exits.say_and_code(error, folder)


def run(config, workdir, command, clock):
    """Start, resume or find finished the run of `workdir` (a `storage.Workdir`) -> exit code. `clock` learns where time goes."""
    from dplora_jax.federation import processes
    from experiments.run import progress, summary, tensorboard

    if config.output.tensorboard:
        tensorboard.check()
    if workdir.finished:
        if processes.primary():
            print(f"This run is finished, nothing was done. {summary.line(workdir.directory)}")
        return 0
    with clock.part("starting"):
        from dplora_jax.finetuning import setup

    with clock.part("reading"):
        job = setup.prepare(config, workdir.stored, command=command, clock=clock)
    asked = _on_sigterm()
    with progress.bar(config.schedule.rounds, None if processes.primary() else True) as show:

        def documents():
            with clock.part("report"):
                _write_documents(config, workdir.directory, job)

        for round in job.fit(workdir, stop=lambda: bool(asked), closing=documents):
            show(round)
            if config.output.tensorboard and processes.primary():
                tensorboard.write(workdir.directory)
    if job.federation.stopped:
        return STOPPED
    if processes.primary():
        print(*clock.in_words(), sep="\n")
        done, rounds = job.federation.history[-1]["round"], config.schedule.rounds
        if done < rounds:
            missing = f"rounds {done + 1} to {rounds} were not run"
            print(f"The budget ended early: {missing}, since rounds that were lost stay paid for.")
        print(summary.line(workdir.directory))
    return 0


def _on_sigterm():
    """A list that SIGTERM makes non-empty: the dispatch under way is finished and saved first."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    return asked


def _write_documents(config, folder, job):
    """A model card beside each adapter, and the report."""
    from dplora_jax import files
    from dplora_jax.privacy import chain
    from experiments import report
    from experiments.run import model_card, summary

    labels = list(job.corpus.label_names)
    reading = files.read_json(folder / "config.json")["federation"].get("label_reading", "")
    for adapter, note in model_card.adapter_notes(config, job.federation.model, summary.line(folder), labels, reading):
        chain.replace_durably(folder / "adapter" / adapter / "README.md", note)
    report.write(folder)
