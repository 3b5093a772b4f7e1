"""What a person sees while a run goes on: a bar on a terminal, nothing elsewhere."""

import contextlib
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Clock:
    """How long the devices waited: all time since the start but that in `busy` blocks."""

    def __init__(self):
        self.start, self.seconds = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def busy(self):
        """Compiling, running (the way of its arguments to the device included) and evaluating go here."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def line(self):
        """What to tell at the end."""
        elapsed = time.perf_counter() - self.start
        waited = elapsed - self.seconds
        share = f"{waited:.1f} s of {elapsed:.1f} s ({waited / elapsed:.1%})"
        return f"The devices waited {share} for input, keys, ledger and checkpoints."


@contextlib.contextmanager
def bar(rounds, done, quiet=None):
    """Yield `show(round, line)`, to be called with each finished round's metrics line; only public figures are shown."""
    console = Console(stderr=True)
    quiet = not sys.stderr.isatty() if quiet is None else quiet
    if quiet:
        yield lambda number, line: None
        return
    columns = (
        TextColumn("round"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("compiling", total=rounds, completed=done)

        def show(number, line):
            metrics = [f"{name} {line[name]:.3f}" for name in ("accuracy", "macro_f1") if name in line]
            text = "  ".join([f"epsilon {line['epsilon_max']:.2f}", *metrics])
            progress.update(task, completed=number, description=text)

        yield show
