"""What many clients take: time and memory of a compiled round by the number of clients K and by how many run at a time (wave).

    python -m experiments.benchmark --measure=clients

Every K and wave runs in a process of its own, for the peak that the system then reports is its alone. Two accounts are fitted by
base + a wave + b K: the most memory that was ever resident while rounds ran, and XLA's own of the compiled round (arguments,
temporaries and outputs), which has no allocator in it.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import pathlib
import subprocess
import sys
import time

import numpy as np

from experiments.text import formats
from experiments.text.tables import Table

CLIENTS, WAVES = (8, 64, 512, 1000), (1, 4)
EXPECTED, RANK = 4, 4
LONG = 500  # clients whose one round takes minutes
ALLOWED = 1024  # bytes of a client beside its own rows


def table(model, clients, waves, records, length, repeats):
    """Lines of the table and of the two fits."""
    bytes_per_client = row_bytes(records, length)
    yield (
        f"{model}: {records} records of {length} tokens a client ({bytes_per_client:,} B), expected batch {EXPECTED}, "
        f"rank {RANK} on q and v"
    )
    rows, body = [], []
    for wave, count in itertools.product(waves, clients):
        measured = _child(model, count, wave, records, length, repeats)
        rows.append((count, wave, measured))
        times = [f"{measured['seconds']:.3f}", f"{1e3 * measured['seconds'] / count:.2f}"]
        body.append(
            [str(count), str(wave), *times, *(formats.size(measured[key]) for key in ("peak", "xla", "temporaries"))]
        )
        print(f"{count} clients, wave {wave}: done", file=sys.stderr, flush=True)
    yield Table(["K", "wave", "round s", "ms/client", "resident", "XLA", "temporaries"], body).text()
    for name, key in (("resident", "peak"), ("XLA", "xla")):
        base, a, b = fit([(count, wave, measured[key]) for count, wave, measured in rows])
        verdict = "within" if b <= bytes_per_client + ALLOWED else "ABOVE"
        yield (
            f"{name}: base {formats.size(base)}, a {formats.size(a)} of a wave's client, b {b:,.0f} B a client: {verdict} its "
            f"rows and 1 KiB ({bytes_per_client + ALLOWED:,} B)"
        )
    for wave in waves:
        seconds, power = _line([(count, measured["seconds"]) for count, w, measured in rows if w == wave])
        yield f"time, wave {wave}: {seconds * 1e3:.2f} ms a client by least squares; seconds grow as K^{power:.3f}"


def row_bytes(records, length):
    """Bytes of a client's own rows: token ids, mask and label, int32."""
    return 4 * records * (2 * length + 1)


def fit(rows):
    """(base, a, b) of bytes = base + a wave + b K, by least squares over (K, wave, bytes)."""
    count, wave, bytes_ = np.array(rows, float).T
    return np.linalg.lstsq(np.stack([np.ones_like(count), wave, count], 1), bytes_, rcond=None)[0]


def _line(rows):
    """The slope of seconds over K, and the power of K that they grow with, both by least squares."""
    count, seconds = np.array(rows, float).T
    return np.polyfit(count, seconds, 1)[0], np.polyfit(np.log(count), np.log(seconds), 1)[0]


def _child(*arguments):
    command = [sys.executable, "-m", "experiments.benchmark.scale", *map(str, arguments)]
    out = subprocess.run(command, capture_output=True, text=True, check=False, cwd=pathlib.Path(__file__).parents[2])
    if out.returncode:
        raise ValueError(f"the round of {arguments[1]} clients failed: {out.stderr.strip().splitlines()[-1]}")
    return json.loads(out.stdout.splitlines()[-1])


def measure(name, clients, wave, records, length, repeats):
    """{"seconds", "peak", "xla", "temporaries"} of a round, the first of them the median of `repeats` rounds after another
    one; of LONG clients and more, of one round alone."""
    import jax

    federation, grid, arguments = _arguments(name, clients, wave, records, length)
    state, rest = arguments[0], arguments[1:]
    from dplora_jax.federation import round

    compiled = round.make(federation, grid).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    del arguments
    _forget_peak()
    seconds = []
    for _ in range(1 if clients >= LONG else repeats + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, *rest))
        seconds.append(time.perf_counter() - start)
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "seconds": float(np.median(seconds[1:] or seconds)),
        "peak": _status("VmHWM"),
        "xla": memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs,
        "temporaries": memory.temp_size_in_bytes,
    }


def _arguments(name, clients, wave, records, length):
    """(Rounds, mesh, (state, params, clients, data, keys)) of a round of random rows."""
    from experiments.benchmark import rounds as benchmark_rounds
    from experiments.benchmark import steps as benchmark_steps

    case = benchmark_steps.Case(name, None, 1, length, RANK, ("q", "v"), False, "classification", "float32", False)
    return benchmark_rounds.federation(case, clients, records, EXPECTED, wave)


def _status(name):
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024


def _forget_peak():
    """Have the system count the peak anew, from what is in use now: compiling takes more than any round, and the allocator
    keeps what it freed."""
    with contextlib.suppress(OSError, AttributeError):  # else compiling counts too
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for argument in ("clients", "wave", "records", "length", "repeats"):
        parser.add_argument(argument, type=int)
    print(json.dumps(measure(*vars(parser.parse_args()).values())))
