"""What only a GPU can show, in at most eight minutes: that the private step is right on it, and what the step costs there.

    launch/gpu_check.sh [--small] [--out=gpu_check.json] [--limit=480]

needs one GPU of 80 GB, this project with JAX for CUDA, and neither the hub nor weights: models have real shapes and random
weights. Each of PARTS is a process with a time limit of its own; what it has found is in the JSON file, part by part, also where
it fails or its time is up, and the other parts go on. --small rehearses all of it at small shapes on a CPU,
with five times as long for each part.

Exit codes: 0 every part ended and every check passed, 1 not so, 2 bad input, 74 a file cannot be written.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback

from absl import flags

from dplora_jax import files
from dplora_jax.errors import InputError
from experiments import cli
from experiments.cli import exits
from experiments.text.tables import Table

CPU = {"JAX_PLATFORMS": "cpu"}
# {name: (its seconds at most, settings of its process)}, 480 seconds together with what starting takes.
PARTS = {
    "environment": (20, {}),
    "clipping": (90, {}),
    "noise": (25, {}),
    "reference": (35, CPU),  # what "federation" is compared with
    "federation": (55, {}),
    "attention": (30, {}),
    "gpt2": (90, {}),
    "llama": (125, {}),
}
SETTINGS = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # PyTorch needs room beside JAX
REHEARSAL = 5  # times as long: a CPU compiles, and another process may have half of it


def define():
    """The flags."""
    values = flags.FlagValues()
    flags.DEFINE_string("out", "gpu_check.json", "file for everything that is found", flag_values=values)
    flags.DEFINE_boolean("small", False, "a rehearsal on a CPU at small shapes", flag_values=values)
    flags.DEFINE_list("parts", list(PARTS), "what to do", flag_values=values)
    flags.DEFINE_integer(
        "limit", 480, "seconds in all, five times as long with --small", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string("part", None, "do this part alone, in this process: its lines of JSON", flag_values=values)
    flags.DEFINE_string("folder", None, "with --part: where parts leave files for each other", flag_values=values)
    return values


@exits.guarded
def main(argv=None):
    """Check what the command line says -> exit code."""
    config = define()
    cli.read_alone(sys.argv[1:] if argv is None else argv, config, "gpu_check", __doc__)
    unknown = {*config.parts, config.part or "noise"} - set(PARTS)
    if unknown:
        raise InputError(f"--parts={','.join(sorted(unknown))} is not known: {', '.join(PARTS)}.")
    if config.part:
        return tell(config)
    found, end = {}, time.monotonic() + config.limit * (REHEARSAL if config.small else 1)
    with tempfile.TemporaryDirectory() as folder:
        for name in config.parts:
            found[name] = run(name, config.small, folder, end - time.monotonic())
            pathlib.Path(config.out).write_text(files.to_json({"small": config.small, "parts": found}, indent=2) + "\n")
            print(f"{name}: {found[name]['ended']}, {found[name]['seconds']:.0f} s", flush=True)
    for line in lines(found):
        print(line)
    print(f"all of it: {config.out}")
    return 0 if all(part["ended"] == "done" and passed(part) for part in found.values()) else 1


def tell(config):
    """Print each line of JSON that the part finds."""
    from experiments.gpu_check import checks, speed

    functions = checks.PARTS | speed.PARTS
    try:
        for line in functions[config.part](config.small, pathlib.Path(config.folder or ".")):
            print(files.to_json(line), flush=True)
    except Exception as error:  # whatever a device's compiler raises
        traceback.print_exc()  # of which the report shows the last line
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def run(name, small, folder, left):
    """{"ended", "seconds", "lines"} of the part `name` in a process of its own, which has `left` seconds at most."""
    limit, settings = PARTS[name]
    limit, began = min(limit * (REHEARSAL if small else 1), left), time.monotonic()
    if limit <= 0:
        return {"ended": "left out: the time is up", "seconds": 0.0, "lines": []}
    command = [sys.executable, "-m", "experiments.gpu_check", f"--part={name}", f"--folder={folder}"]
    output, errors = (pathlib.Path(folder) / f"{name}.{kind}" for kind in ("lines", "errors"))
    with open(output, "wb") as out, open(errors, "wb") as err:
        env = os.environ | SETTINGS | settings | (CPU if small else {})
        try:
            done = subprocess.run([*command, *["--small"] * small], stdout=out, stderr=err, env=env, timeout=limit)
            ended = "done" if done.returncode == 0 else f"failed: {_last(errors)}"
        except subprocess.TimeoutExpired:
            ended = f"cut off after {limit:.0f} s"
    whole = [line for line in output.read_text(errors="replace").splitlines(keepends=True) if line.endswith("}\n")]
    return {"ended": ended, "seconds": time.monotonic() - began, "lines": [json.loads(line) for line in whole]}


def _last(path):
    """The last line of a file of errors."""
    said = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return said[-1][:300] if said else "without a word"


def passed(part):
    """Whether every check of a part passed."""
    return all(line.get("passed", True) for line in part["lines"])


def lines(found):
    """The lines of what is printed: a table of each part, whose columns are those of its lines."""
    for name, part in found.items():
        yield f"\n{name}: {part['ended']}" + ("" if passed(part) else ", with checks that did NOT pass")
        shapes = {}
        for line in part["lines"]:
            shapes.setdefault(tuple(line), []).append([_cell(value) for value in line.values()])
        for head, rows in shapes.items():
            # One line alone is easier to read as names and values.
            table = Table(list(head), rows) if len(rows) > 1 else Table([], list(zip(head, rows[0], strict=True)))
            yield from table.text().splitlines()


def _cell(value):
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " .. ".join(map(_cell, value))
    return {True: "yes", False: "NO"}.get(value, str(value)) if isinstance(value, bool) else str(value)
