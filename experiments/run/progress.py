"""What a person sees while a run goes on: a bar on a terminal, nothing elsewhere."""

import contextlib
import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOWN = ("accuracy", "macro_f1", "private_accuracy", "private_macro_f1")


@contextlib.contextmanager
def bar(rounds, quiet=None):
    """Yield `show(round)`, to be called with each finished `federation.Round`; only public figures are shown."""
    console = Console(stderr=True)
    quiet = not sys.stderr.isatty() if quiet is None else quiet
    if quiet:
        yield lambda round: None
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
        task = progress.add_task("compiling", total=rounds)

        def show(round):
            metrics = [f"{name} {round.metrics[name]:.3f}" for name in SHOWN if name in round.metrics]
            text = "  ".join([f"epsilon {max(round.epsilon):.2f}", *metrics])
            progress.update(task, completed=round.number, description=text)

        yield show
