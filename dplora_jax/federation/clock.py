"""How long devices work, and how long they wait."""

import contextlib
import time


class Clock:
    """How long the devices waited: all time from the start to `stop` but that in `busy` blocks."""

    def __init__(self):
        self.start, self.end, self.seconds = time.perf_counter(), None, 0.0

    @contextlib.contextmanager
    def busy(self):
        """Compiling, running (the way of its arguments to the device included) and evaluating go here."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def stop(self):
        """The rounds are over: what is written after them keeps no device waiting."""
        self.end = time.perf_counter()

    def in_words(self):
        """What to say at the end."""
        elapsed = (self.end or time.perf_counter()) - self.start
        waited = elapsed - self.seconds
        share = f"{waited:.1f} s of {elapsed:.1f} s ({waited / elapsed:.1%})"
        return f"The devices waited {share} for input, keys, ledger and checkpoints."
