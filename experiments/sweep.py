"""Many runs, one table: every case, every varied flag, every seed; what is finished is never run again.

    python -m experiments.sweep --flagfile=phrasebank.flags --data_dir=DIR --out=sweep.jsonl --seeds=1,2,3 \
        --case='FedAvg:' --case='FedEx-LoRA: --aggregation=fedex' --vary='epsilon=8|inf' --vary='partition=iid|dirichlet:0.1'

Every flag of a run is taken. A cell is one case, one value of each varied flag and one seed, which is `--seed` and
`--split_seed`; its line in --out is written when it is finished. Nothing else is saved, and nothing here is for release.
Prints a Markdown table of means and standard deviations over seeds. Exit codes: 0 done, 2 bad input.
"""

import dataclasses
import itertools
import json
import pathlib
import shlex
import statistics
import sys
import time

from absl import flags as absl_flags

from dplora_jax.errors import InputError
from experiments import allocator, flags

METRICS = ("accuracy", "macro_f1")


def main(argv=None):
    """Run the command line `argv` (default: this process's) -> exit code."""
    try:
        cells, out = parse(sys.argv[1:] if argv is None else argv)
        done = read(out)
        missing = [cell for cell in cells if _key(cell[0]) not in {_key(line) for line in done}]
        memo, programs = {}, {}
        for number, (name, config) in enumerate(missing, 1):
            line = name | outcome(config, memo, programs)
            with open(out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            done.append(line)
            print(f"{number} of {len(missing)}: {json.dumps(line)}", file=sys.stderr, flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wanted = {_key(name) for name, _ in cells}
    print(table([line for line in done if _key(line) in wanted]))
    return 0


def parse(argv):
    """The command line (without the program's name) -> ([(the cell's name as a dict, RunConfig)], the file of finished cells)."""
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_multi_string("case", ["as given:"], "a name, a colon and flags of a run", flag_values=values)
    absl_flags.DEFINE_multi_string("vary", [], "FLAG=VALUE|VALUE|...", flag_values=values)
    absl_flags.DEFINE_list("seeds", ["1"], "seeds of noise, split and partition", flag_values=values)
    absl_flags.DEFINE_string("out", "sweep.jsonl", "file of finished cells, a line each", flag_values=values)
    values, _ = flags.read(argv, values, "python -m experiments.sweep --flagfile=phrasebank.flags [flags]")
    own = ("case", "vary", "seeds", "out")
    kept = [part for part in _spaced(argv) if part.lstrip("-").partition("=")[0] not in own]
    cells = []
    for case, *chosen, seed in itertools.product(values.case, *map(_values, values.vary), values.seeds):
        name, colon, more = case.partition(":")
        if not colon or not seed.isdigit():
            raise InputError(f"--case={case} needs NAME: and flags, and --seeds={seed} whole numbers.")
        varied = [f"--{flag}={value}" for flag, value in chosen]
        argv = [*kept, *varied, *shlex.split(more), f"--seed={seed}", f"--split_seed={seed}"]
        cells.append(({"case": name.strip(), **dict(chosen), "seed": int(seed)}, flags.parse(argv)))
    return cells, pathlib.Path(values.out)


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


def _key(line):
    """What tells a cell from others: all that names it."""
    return json.dumps({k: v for k, v in sorted(line.items()) if k not in (*METRICS, "epsilon_max", "seconds")})


def read(path):
    """The finished cells of an earlier start; a line that was cut off by a kill is as none."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def outcome(config, memo, programs):
    """The public metrics after the last round of `config`. `memo` keeps what frozen layers made of a table, and `programs`
    compiled rounds, from cell to cell."""
    from dplora_jax.federation.round import make
    from dplora_jax.privacy import secrets
    from experiments import setup, trust_modes, unsaved

    start = time.perf_counter()
    prepared = setup.prepare(dataclasses.replace(config, eval_every=config.eval_every or 1), memo=memo)
    like = (dataclasses.replace(config, seed=0, split_seed=0), prepared.federation.local, prepared.federation.rule)
    if like not in programs:
        programs.clear()  # one case at a time
        programs[like] = make(prepared.federation, prepared.mesh)
    held = secrets.from_seed(config.seed, trust_modes.parties(config))
    state = unsaved.train(config, prepared, held, programs[like])
    found = prepared.evaluate(state)
    spent = max(client["epsilon"] for client in prepared.facts["clients"])
    return {name: found[name] for name in METRICS} | {
        "epsilon_max": spent if config.private else "inf",
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(lines):
    """A Markdown table: a row a case, two columns for each choice of varied flags, mean ± standard deviation over seeds."""
    names = (
        [name for name in lines[0] if name not in ("case", "seed", *METRICS, "epsilon_max", "seconds")] if lines else []
    )
    columns = list(dict.fromkeys(tuple(line[name] for name in names) for line in lines))
    cases = list(dict.fromkeys(line["case"] for line in lines))
    titles = [", ".join(f"{n} {v}" for n, v in zip(names, column, strict=True)) for column in columns]
    header = [f"{title} {metric}".strip().replace("_", " ") for title in titles for metric in METRICS]
    rows = [["case", *header], ["---"] * (1 + len(header))]
    for case in cases:
        own = [
            [ln for ln in lines if ln["case"] == case and tuple(ln[n] for n in names) == column] for column in columns
        ]
        rows.append([case, *(_spread([ln[metric] for ln in found]) for found in own for metric in METRICS)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _spread(values):
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


if __name__ == "__main__":
    allocator.keep_freed_memory()
    sys.exit(main())
