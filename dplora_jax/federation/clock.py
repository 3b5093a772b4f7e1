"""Where the time of a run goes, and how long its devices wait."""

import contextlib
import time

# What keeps the devices at work, or is no waiting.
BUSY = "public records", "compiling", "rounds", "evaluating"


class Clock:
    """Seconds by part. A `part` within a part counts for itself alone.

    The devices wait in all time between `begin` (when the rounds are prepared) and `stop` but that in parts of BUSY.
    """

    def __init__(self):
        self.made, self.seconds, self.start, self.end = time.perf_counter(), {}, None, None
        self._inner = [0.0]  # seconds of the parts that ended within each part that is open, from the outermost on
        self._busy_before = self._waited = 0.0

    @contextlib.contextmanager
    def part(self, name):
        """What is done in this context belongs to the part `name`."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._inner.pop()
            self._inner[-1] += elapsed

    def begin(self):
        """All is prepared: from here on the devices are to be kept at work."""
        self.start, self.end, self._busy_before = time.perf_counter(), None, self._busy()

    def stop(self):
        """The rounds are over: what is done after them keeps no device waiting."""
        self.end = time.perf_counter()
        self._waited = self.end - self.start - (self._busy() - self._busy_before)

    def _busy(self):
        return sum(self.seconds.get(name, 0.0) for name in BUSY)

    def parts(self):
        """{part: seconds} of all time since the clock was made, in the order in which the parts first ended."""
        elapsed = time.perf_counter() - self.made
        return self.seconds | {"all else": elapsed - sum(self.seconds.values())}

    def in_words(self):
        """Lines to say at the end: the parts, and, where rounds have come to their end, how long the devices waited."""
        parts = self.parts()
        said = [f"{name} {spent:.1f}" for name, spent in parts.items() if spent >= 0.05]
        yield f"{sum(parts.values()):.0f} s: {', '.join(said)}."
        if self.end is not None:
            elapsed = self.end - self.start
            share = f"{self._waited:.1f} s of {elapsed:.1f} s ({self._waited / elapsed:.1%})"
            yield f"The devices waited {share} for input, keys, ledger and checkpoints."
