"""Many runs, one table: every case, every varied flag, every seed; what is finished is never run again.

    python -m experiments.sweep --flagfile=phrasebank.flags --data_dir=DIR --out=sweep.jsonl --seeds=1,2,3 --controls \
        --case='FedAvg:' --case='FedEx-LoRA: --aggregation=fedex' --vary='epsilon=8|inf' --vary='partition=iid|dirichlet:0.1'

Every flag of a run is taken. A cell is one case, one value of each varied flag and one seed, which is `--seed` and
`--split_seed`; its line in --out is written when it is finished. Nothing else of a run is saved, and nothing here is for release.
--controls adds what every table should be read beside (`controls`). --parallel=N runs N cells at a time: each of N processes has
an accelerator of its own, or its share of the processor's cores. Prints a Markdown table of means and standard deviations over
seeds, and writes it with plots beside --out, as .md and .html. Exit codes: 0 done, 2 bad input.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from typing import NamedTuple

from absl import flags as absl_flags

from dplora_jax.errors import InputError
from experiments import allocator, flags, run_config, sweep_report
from experiments.sweep_report import ANY, OUTCOME

BUDGET = ("epsilon", "delta", "noise_multiplier")  # what a run without privacy does not ask for
NO_PRIVACY = "--trust=none --epsilon=none --noise_multiplier=none"
ONE = "--clients=1 --trust=local --participation=all --aggregation=fedavg --robust=none"
RUN, BASE, BEST = "run", "base model", "best client alone, no privacy"
MEASURED = (
    "generate",
    "new_tokens",
    "benchmarks",
    "benchmarks_dir",
    "benchmark_records",
)  # what is measured, of a run's free flags
DEVICES = ("CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS", "ROCR_VISIBLE_DEVICES")


class Cell(NamedTuple):
    """One run: what names it in the file of finished cells, and its RunConfig. `kind` is RUN, BASE (the base model is measured)
    or BEST (the best of --parties clients, each alone)."""

    name: dict
    config: flags.RunConfig
    kind: str


def controls(config):
    """{name: (flags, whether it has no privacy to spend)} of what a table of `config` should be read beside."""
    # Rates that fit scaled features are for clipped gradients; --auto chooses others for what is not clipped.
    unclipped = "" if config.feature_norm and not config.auto else " --clip_norm=inf"
    pooled = f"{ONE} --partition=iid --expected_batch_size={config.clients * config.expected_batch_size:g}"
    found = {
        BASE: (NO_PRIVACY, True),
        "no privacy": (NO_PRIVACY + unclipped, True),
        "clipped, no noise": (NO_PRIVACY, True),
        "all data in one client": (pooled, False),
        "first client alone": (f"{ONE} --parties={config.clients}", False),
        BEST: (f"{ONE} {NO_PRIVACY}{unclipped} --parties={config.clients}", True),
    }
    if _has_head(config):
        found["head alone"] = ("--head_only", False)
    return found


def _has_head(config):
    from dplora_jax.models import pretrained

    if config.objective == "auto":
        return pretrained.model_type(config.model) == "bert"
    return config.objective == "classifier"


def main(argv=None):
    """Run the command line `argv` (default: this process's) -> exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        cells, own = parse(argv)
        missing = _missing(cells, own.out)
        if own.parallel > 1 and own.worker is None:
            _spread(argv, min(own.parallel, len(missing)))
        else:
            # A worker's share is of all cells, and so the same however many are done when it starts.
            mine = cells if own.worker is None else cells[own.worker :: own.parallel]
            _run([cell for cell in mine if cell in missing], own.out)
        if own.worker is not None:
            return 0
        wanted = {key(cell.name) for cell in cells}
        lines = list({key(line): line for line in read(own.out) if key(line) in wanted}.values())
        if _missing(cells, own.out):
            raise InputError("some cells did not finish: see what was printed above, and run the same command again.")
        for suffix, text in (
            (".md", sweep_report.markdown(lines)),
            (".html", sweep_report.page(lines, cells[0].config, argv)),
        ):
            own.out.with_suffix(suffix).write_text(text, encoding="utf-8")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(sweep_report.markdown(lines))
    return 0


class Own(NamedTuple):
    """The sweep's own flags."""

    out: pathlib.Path
    parallel: int
    worker: int | None


def parse(argv):
    """The command line (without the program's name) -> (list of Cell, Own)."""
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_multi_string("case", ["as given:"], "a name, a colon and flags of a run", flag_values=values)
    absl_flags.DEFINE_multi_string("vary", [], "FLAG=VALUE|VALUE|...", flag_values=values)
    absl_flags.DEFINE_list("seeds", ["1"], "seeds of noise, split and partition", flag_values=values)
    absl_flags.DEFINE_boolean("controls", False, "add the controls that a table is read beside", flag_values=values)
    absl_flags.DEFINE_integer("parallel", 1, "cells at a time", lower_bound=1, flag_values=values)
    absl_flags.DEFINE_integer("worker", None, "which of --parallel this process is (set by itself)", flag_values=values)
    absl_flags.DEFINE_string("out", "sweep.jsonl", "file of finished cells, a line each", flag_values=values)
    own = tuple(values)
    values, _ = flags.read(argv, values, "python -m experiments.sweep --flagfile=phrasebank.flags [flags]")
    kept = [part for part in _spaced(argv) if part.lstrip("-").removeprefix("no").partition("=")[0] not in own]
    varied = [_values(spec) for spec in values.vary]
    cells, told = {}, []  # what --auto chose
    for case, *settings, seed in itertools.product(values.case, *varied, values.seeds):
        name, colon, more = case.partition(":")
        if not colon or not seed.isdigit():
            raise InputError(f"--case={case} needs NAME: and flags, and --seeds={seed} whole numbers.")
        _add(cells, kept, name.strip(), settings, more, seed, say=told.append)
    cases = {cell.name["case"] for cell in cells.values()}
    for *settings, seed in itertools.product(*varied, values.seeds) if values.controls else ():
        words = [f"--{flag}={value}" for flag, value in settings]
        for name, (more, bare) in controls(flags.parse([*kept, *words], lambda _: None)).items():
            if name in cases:
                raise InputError(f"--case={name} is one of --controls too: give the case another name.")
            asked = [(flag, ANY if bare and flag in BUDGET else value) for flag, value in settings]
            try:
                kind = name if name in (BASE, BEST) else RUN
                _add(cells, kept, name, asked, more, seed, kind, told.append)
            except InputError as error:
                print(f"warning: the control {name!r} does not go with these flags ({error})", file=sys.stderr)
    if values.worker is None:
        print("".join(f"{line}\n" for line in dict.fromkeys(told)), end="", file=sys.stderr)
    return list(cells.values()), Own(pathlib.Path(values.out), values.parallel, values.worker)


def _add(cells, kept, case, settings, more, seed, kind=RUN, say=print):
    """Put one cell into `cells`, by what tells it from others."""
    words = [f"--{flag}={value}" for flag, value in settings if value != ANY]
    config = flags.parse([*kept, *words, *shlex.split(more), f"--seed={seed}", f"--split_seed={seed}"], say)
    name = {"case": case, **dict(settings), "seed": int(seed), "config": _digest(config, kind)}
    cells[key(name)] = Cell(name, config, kind)


def _digest(config, kind):
    """Of all that decides a cell's outcome. Flags at their defaults are left out, of which a later version may have more."""
    told = {"kind": kind}
    for field in dataclasses.fields(config):
        value, free = (
            getattr(config, field.name),
            field.name in run_config.FREE_ON_RESUME and field.name not in MEASURED,
        )
        if value != field.default and not free:
            told[field.name] = value
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def _spaced(argv):
    """Every option as one word, --name=value."""
    words = []
    for word in argv:
        if word.startswith("--"):
            words.append(word)
        elif words and "=" not in words[-1]:
            words[-1] += f"={word}"
        else:
            raise InputError(f"unexpected argument {word!r}: every option is a --flag.")
    return words


def _values(spec):
    flag, equals, values = spec.partition("=")
    if not equals or not values:
        raise InputError(f"--vary={spec} is malformed: FLAG=VALUE|VALUE.")
    return [(flag, value) for value in values.split("|")]


def key(line):
    """What tells a cell from others: all that names it."""
    return json.dumps({k: v for k, v in sorted(line.items()) if k not in OUTCOME})


def _missing(cells, path):
    done = {key(line) for line in read(path)}
    return [cell for cell in cells if key(cell.name) not in done]


def read(path):
    """The finished cells of an earlier start; a line that was cut off by a kill is as none."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def _run(cells, out):
    memo, programs = {}, {}
    for number, cell in enumerate(cells, 1):
        # The same may be finished under another name: lines over epsilon and over delta cross.
        like = next((line for line in read(out) if line.get("config") == cell.name["config"]), None)
        line = cell.name | ({k: like[k] for k in OUTCOME if k in like} if like else outcome(cell, memo, programs))
        with open(out, "a", encoding="utf-8") as file:  # a line is written at once: processes may share the file
            torn = out.stat().st_size and not out.read_bytes().endswith(b"\n")
            file.write("\n" * torn + json.dumps(line) + "\n")
        print(f"{number} of {len(cells)}: {json.dumps(line)}", file=sys.stderr, flush=True)


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
    parties = range(config.parties) if cell.kind == BEST else (config.party,)
    each = [_trained(dataclasses.replace(config, party=party), cell.kind, memo, programs) for party in parties]
    metrics, facts = max(each, key=lambda one: _better(one[0]))
    spent = max(client["epsilon"] for client in facts["clients"])
    rounds = 0 if cell.kind == BASE else config.rounds
    return {
        "metrics": {name: value for name, value in metrics.items() if isinstance(value, int | float)},
        "epsilon_max": spent if config.private else "inf",
        "bytes_up_per_client": rounds * facts["communication"]["bytes_up_per_client_per_round"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def _better(metrics):
    """A number that is larger for the better model."""
    return metrics["accuracy"] if "accuracy" in metrics else -metrics["perplexity"]


def _trained(config, kind, memo, programs):
    """(metrics, facts) of one run of `config`, or of its base model."""
    from dplora_jax.federation.round import make
    from dplora_jax.privacy import secrets
    from experiments import setup, trust_modes, unsaved

    prepared = setup.prepare(dataclasses.replace(config, eval_every=config.eval_every or 1), memo=memo)
    state = prepared.state
    if kind != BASE:
        like = (
            dataclasses.replace(config, seed=0, split_seed=0, party=0),
            prepared.federation.local,
            prepared.federation.rule,
        )
        if like not in programs:
            programs.clear()  # one case at a time
            programs[like] = make(prepared.federation, prepared.mesh)
        held = secrets.from_seed(config.seed, trust_modes.parties(config))
        state = unsaved.train(config, prepared, held, programs[like])
    return prepared.evaluate(state, ends=True), prepared.facts


if __name__ == "__main__":
    allocator.keep_freed_memory()
    sys.exit(main())
