"""Which scores of a run are public, private or exact, in words; no JAX."""

import math

from dplora_jax.federation.held_out import SPENT
from dplora_jax.files import number
from experiments.text import formats


def public(line):
    """The scores on the public test set in a metrics `line` (a dict), in words."""
    return [
        f"{label} {formats.metric(float(line[name]), name)}" for name, label in formats.METRICS.items() if name in line
    ]


def private(line):
    """The scores on private records in a metrics `line`, in words, each with its interval."""
    return [
        f"{label} {formats.metric(float(line[name]), name)} ({span(line, name)})"
        for name, label in formats.PRIVATE_METRICS.items()
        if name in line
    ]


def span(line, name):
    """The 95 % interval of the metric `name` in a metrics `line`, in words; "" where it has none."""
    ends = [number(line.get(f"{name}_{end}")) for end in ("low", "high")]
    return "" if None in ends else " to ".join(formats.metric(end, name) for end in ends)


def of_line(stored, line):
    """All scores of a metrics `line` in words; "not evaluated" where there are none. `stored` is a `workdir_files.Stored`."""
    words = [f"test {', '.join(public(line))}"] if public(line) else []
    if private(line):
        kind = "noisy" if stored.private else "EXACT"
        words.append(f"{', '.join(private(line))}, {kind}, {kept_back(stored)} {stored.config.privacy.unit}s")
    return "; ".join(words) or "not evaluated"


def kept_back(stored):
    """How many records are kept back to be scored on, in words."""
    planned = stored.description["private_test"]
    return formats.number(sum(planned["units"])) if planned else "unknown"


def spent(lines):
    """The epsilon that scores have cost a record that is kept back, by the metrics `lines` (dicts); None where there are none."""
    return max((line[SPENT] for line in lines if SPENT in line), default=None)


def kinds(stored, lines):
    """A sentence for each kind of score in the metrics `lines`: exact and public, noisy and private, or exact and private."""
    sentences = []
    names = {name for line in lines for name in line}
    shown = [label for name, label in formats.METRICS.items() if name in names]
    if shown:
        records = stored.description["data"]["test_records"]
        on = f"{formats.number(records)} records" if records else "records"
        sentences.append(f"PUBLIC: {', '.join(shown)} are exact, on {on} whose owner declares them public.")
    shown = [label for name, label in formats.METRICS.items() if f"private_{name}" in names]
    if not shown:
        return sentences
    on = f"{kept_back(stored)} private {stored.config.privacy.unit}s that never train"
    interval = "The interval is the 95 % that {} leave{}"
    if stored.private and math.isfinite(spent(lines) or 0.0):
        cost = f"epsilon {formats.epsilon(spent(lines))} at delta {formats.number(stored.config.privacy.delta)}"
        noisy = f"PRIVATE: {', '.join(shown)} are noisy, on {on}; all that were shown cost one of these {cost}."
        return [*sentences, f"{noisy} {interval.format('noise and sampling', '')}."]
    return [*sentences, f"EXACT, NOT PRIVATE: {', '.join(shown)}, on {on}. {interval.format('sampling', 's')}."]
