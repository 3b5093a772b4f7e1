"""Many runs, one table: every case, every varied flag, every seed; what is finished is never run again.

    python -m experiments.sweep --flagfile=phrasebank.flags --data_dir=DIR --out=sweep.jsonl --seeds=1,2,3 --controls \
        --case='FedAvg:' --case='FedEx-LoRA: --aggregation=fedex' --vary='epsilon=8|inf' --vary='partition=iid|dirichlet:0.1'

Every flag of a run is taken. A cell is one case, one value of each varied flag and one seed, which is `--seed` and
`--split_seed`; its line in --out is written when it is finished. It is known by its flags alone: after a change of data or code,
give another --out. Nothing else of a run is saved, and nothing here is for release.
--controls adds what every table should be read beside (`sweep_cells.controls`). --parallel=N runs N cells at a time: each of N
processes has an accelerator of its own, or its share of the processor's cores. Prints a Markdown table of means and standard
deviations over seeds, and writes it with plots beside --out, as .md and .html. Exit codes: 0 done, 2 bad input,
74 a file cannot be written.
"""

import collections
import contextlib
import math
import os
import subprocess
import sys
import time

from dplora_jax import errors, guard, private_files
from dplora_jax.config import replace
from dplora_jax.errors import InputError
from dplora_jax.federation import trust
from dplora_jax.files import parse_json, to_json
from dplora_jax.privacy.chain import replace_durably
from experiments import cli
from experiments.cli import exits
from experiments.sweep import report as sweep_report
from experiments.sweep.cells import BEST, key, parse, settings
from experiments.sweep.report import BASE, OUTCOME

DEVICES = ("CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS", "ROCR_VISIBLE_DEVICES")


@exits.guarded
def main(argv=None):
    """Run the command line `argv` (default: this process's) -> exit code."""
    guard.begin(phrase=cli.as_flags)
    argv = sys.argv[1:] if argv is None else argv
    cells, options = parse(argv)
    missing = _missing(cells, options.out)
    if options.parallel > 1 and options.worker is None:
        _spread(argv, min(options.parallel, len(missing)))
    else:
        # A worker's share is taken of all cells, and so is the same however many are done when it starts.
        mine = cells if options.worker is None else cells[options.worker :: options.parallel]
        with private_files.reasons_in(options.out.parent):
            _run([cell for cell in mine if cell in missing], options.out)
    if options.worker is not None:
        return 0
    wanted = {key(cell.name) for cell in cells}
    lines = [line for line in read(options.out) if key(line) in wanted]
    if _missing(cells, options.out):
        raise InputError("some cells did not finish: see what was printed above, and run the same command again.")
    for suffix, text in (
        (".md", sweep_report.markdown(lines)),
        (".html", sweep_report.page(lines, cells[0].config, argv)),
    ):
        replace_durably(options.out.with_suffix(suffix), text, private_files.MODE)
    print(sweep_report.markdown(lines))
    return 0


def _missing(cells, path):
    done = {key(line) for line in read(path)}
    return [cell for cell in cells if key(cell.name) not in done]


def read(path):
    """The finished cells of an earlier start, each once; a line that was cut off by a kill is as none."""
    lines = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = parse_json(text.encode(), path)
        except ValueError:
            continue
        lines[key(line)] = line
    return list(lines.values())


def finished(path):
    """The finished cells in `path`, for a report; InputError where there are none, or where they are not of one sweep's flags."""
    lines, settings = read(path), {}
    if not lines:
        raise InputError(f"--sweep={path} holds no finished cell: give the file that experiments.sweep wrote (--out).")
    for line in lines:
        settings.setdefault(sweep_report.place(line), set()).add(line.get("settings"))
    if any(len(several) > 1 for several in settings.values()):
        raise InputError(
            f"--sweep={path} holds cells of several sets of flags under one name, which no table can tell apart: run the sweep "
            "into a file of its own (--out)."
        )
    return lines


def _run(cells, out):
    memo, programs = {}, {}
    for number, cell in enumerate(cells, 1):
        # The same may be finished under another name: lines over epsilon and over delta cross.
        like = next((line for line in read(out) if line.get("config") == cell.name["config"]), None)
        line = cell.name | ({k: like[k] for k in OUTCOME if k in like} if like else outcome(cell, memo, programs))
        with private_files.open_to_append(out) as file:  # a line is written at once: processes may share the file
            torn = out.stat().st_size and not out.read_bytes().endswith(b"\n")
            file.write("\n" * torn + to_json(line) + "\n")
        print(f"{number} of {len(cells)}: {to_json(line)}", file=sys.stderr, flush=True)


def _spread(argv, count):
    """Run `count` workers, each on its own devices: one of the visible accelerators each, else its share of the cores."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    command = [sys.executable, "-m", "experiments.sweep", *argv, f"--parallel={count}"]
    workers = []
    for index in range(count):
        visible = {name: _nth(os.environ.get(name), index) for name in DEVICES}
        worker = subprocess.Popen([*command, f"--worker={index}"], env=os.environ | visible)
        if len(cores) >= count and os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
            os.sched_setaffinity(worker.pid, cores[index::count])
        workers.append(worker)
    codes = [worker.wait() for worker in workers]
    if errors.StorageError.code in codes:
        raise errors.StorageError("a worker could not write: see what it printed above; what is finished is kept.")
    if any(codes):
        raise InputError("a worker failed: see what it printed above; what is finished is kept.")


def _nth(listed, index):
    """The `index`-th of a comma-separated list of devices, or `index` itself where none is given."""
    names = (listed or "").split(",")
    return names[index % len(names)] if listed else str(index)


def outcome(cell, memo, programs):
    """The public metrics of `cell`. `memo` keeps what frozen layers made of a table, and `programs` compiled rounds, from cell to
    cell."""
    start, config = time.perf_counter(), cell.config
    parties = range(config.data.parties) if cell.kind == BEST else (config.data.party,)
    each = [_trained(replace(config, party=party), cell.kind, memo, programs) for party in parties]
    metrics, described = max(each, key=lambda one: _better(one[0]))
    spent = max(client["epsilon"] for client in described["clients"])
    rounds = 0 if cell.kind == BASE else config.schedule.rounds
    return {
        "metrics": {name: value for name, value in metrics.items() if isinstance(value, int | float)},
        "epsilon_max": spent if trust.mode(config).private else "inf",
        "bytes_up_per_client": rounds * described["communication"]["bytes_up_per_client_per_round"],
        "seconds": round(time.perf_counter() - start, 1),
        "of": f"{config.base.name} on {config.data.dataset}",
        "settings": settings(cell),
        "release": described["release"] or "NOT FOR RELEASE: no privacy",
        "commonest_label": described["data"]["commonest_label"],
    }


def _better(metrics):
    """A number that is larger for the better model."""
    value = metrics["accuracy"] if "accuracy" in metrics else -metrics["perplexity"]
    return -math.inf if math.isnan(value) else value


def _trained(config, kind, memo, programs):
    """(metrics, facts) of one run of `config`, or of its base model."""
    from dplora_jax.federation import storage
    from dplora_jax.finetuning import setup

    like = replace(config, seed=0, split_seed=0, party=0)
    if like not in programs:
        programs.clear()  # one case at a time
        programs[like] = {}
    # Nothing is evaluated on the way, and everything at the end.
    config = replace(config, eval_every=config.schedule.rounds)
    job = setup.prepare(config, memo=memo, programs=programs[like])
    if kind == BASE:
        job.federation.prepare(job.shards)
    else:
        with contextlib.suppress(errors.NotFiniteError):  # its metrics are nan, and its row says so
            collections.deque(job.federation.fit(job.shards, storage.InMemory(), start=job.start), maxlen=0)
    return job.federation.evaluate(job.evaluate), job.federation.describe(job.describe)
