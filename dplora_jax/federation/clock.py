"""How long devices work, and how long they wait."""

import contextlib
import time


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

    def in_words(self):
        """What to say at the end."""
        elapsed = time.perf_counter() - self.start
        waited = elapsed - self.seconds
        share = f"{waited:.1f} s of {elapsed:.1f} s ({waited / elapsed:.1%})"
        return f"The devices waited {share} for input, keys, ledger and checkpoints."
