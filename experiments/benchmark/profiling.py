"""A trace of the steps for Perfetto and TensorBoard, and what takes the time in them, by kind of operation."""

import collections
import gzip
import json
import pathlib
import re

import jax

from experiments.benchmark import steps as benchmark_steps

TURNS = 2


def lines(case, forms, directory):
    """Run the plain step and each form a few times under JAX's profiler -> lines: where the trace lies, and the operations that
    take most of each."""
    model, params, adapter, batch = benchmark_steps.arguments(case)
    for name, function in benchmark_steps.functions(case, model, forms).items():
        run = benchmark_steps.compiled(function, params, adapter, batch, donate=()).run
        for _ in range(TURNS):
            jax.block_until_ready(run(params, adapter, batch))
        place = pathlib.Path(directory) / name
        with jax.profiler.trace(str(place), create_perfetto_trace=True):
            for _ in range(TURNS):
                jax.block_until_ready(run(params, adapter, batch))
        yield f"{name}: trace in {place} (perfetto_trace.json.gz opens in ui.perfetto.dev, the rest in TensorBoard)"
        yield from (f"  {1e3 * seconds:9.1f} ms  {count:6} x  {kind}" for kind, seconds, count in largest(place))


def largest(place, most=12):
    """The kinds of operations that take most of one turn: [(kind, seconds of all threads, how often)]."""
    trace = max(place.glob("**/perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    seconds, counts = collections.Counter(), collections.Counter()
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            kind = re.sub(r"[.\d]+$", "", event["args"]["hlo_op"])
            seconds[kind] += event["dur"] * 1e-6 / TURNS
            counts[kind] += 1
    return [(kind, value, counts[kind] // TURNS) for kind, value in seconds.most_common(most)]
