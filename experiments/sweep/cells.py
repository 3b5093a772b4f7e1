"""The cells of a sweep, from its command line: cases, values of varied flags, seeds, and the controls beside them."""

import hashlib
import itertools
import json
import pathlib
import shlex
import sys
from typing import NamedTuple

from absl import flags as absl_flags

from dplora_jax.config import FIELDS, METRICS, RESULT, RunConfig, deciding, replace, to_flat
from dplora_jax.errors import InputError
from experiments import cli
from experiments.sweep.report import ANY, BASE, OUTCOME

BUDGET = ("epsilon", "delta", "noise_multiplier")  # what a run without privacy does not ask for
NO_PRIVACY = "--trust=none --epsilon=none --noise_multiplier=none"
ONE = "--clients=1 --trust=local --participation=all --aggregation=fedavg --robust=none"
RUN, BEST = "run", "best client alone, no privacy"


class Cell(NamedTuple):
    """One run: what names it in the file of finished cells, and its RunConfig. `kind` is RUN, BASE (the base model is measured)
    or BEST (the best of --parties clients, each alone)."""

    name: dict
    config: RunConfig
    kind: str


def controls(config):
    """{name: (flags, whether it has no privacy to spend)} of what a table of `config` should be read beside."""
    # Rates that fit scaled features are too small for gradients that are not clipped; --auto chooses others for these.
    clipped = config.base.feature_norm and _has_head(config) and not config.output.auto
    bare = NO_PRIVACY if clipped else f"{NO_PRIVACY} --clip_norm=inf"
    pooled = (
        f"{ONE} --partition=iid --expected_batch_size={config.schedule.clients * config.schedule.expected_batch_size:g}"
    )
    cases = {BASE: (NO_PRIVACY, True)}
    if not clipped:
        cases["no privacy"] = (bare, True)
    cases |= {
        "clipped, no noise": (NO_PRIVACY, True),
        "all data in one client": (pooled, False),
        "first client alone": (f"{ONE} --parties={config.schedule.clients}", False),
        BEST: (f"{ONE} {bare} --parties={config.schedule.clients}", True),
    }
    if _has_head(config):
        cases["head alone"] = ("--head_only", False)
    return cases


def _has_head(config):
    from dplora_jax.models import pretrained

    if config.data.objective == "auto":
        return pretrained.bidirectional(config.base.name)
    return config.data.objective == "classifier"


class Options(NamedTuple):
    """The sweep's own flags."""

    out: pathlib.Path
    parallel: int
    worker: int | None


def parse(argv):
    """The command line (without the program's name) -> (list of Cell, Options)."""
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_multi_string("case", ["as given:"], "a name, a colon and flags of a run", flag_values=values)
    absl_flags.DEFINE_multi_string("vary", [], "FLAG=VALUE|VALUE|...", flag_values=values)
    absl_flags.DEFINE_list("seeds", ["1"], "seeds of noise, split and partition", flag_values=values)
    absl_flags.DEFINE_boolean("controls", False, "add the controls that a table is read beside", flag_values=values)
    absl_flags.DEFINE_integer("parallel", 1, "cells at a time", lower_bound=1, flag_values=values)
    absl_flags.DEFINE_integer("worker", None, "which of --parallel this process is (set by itself)", flag_values=values)
    absl_flags.DEFINE_string("out", "sweep.jsonl", "file of finished cells, a line each", flag_values=values)
    own_flags = tuple(values)
    values, _ = cli.read(argv, values, "python -m experiments.sweep --flagfile=phrasebank.flags [flags]")
    kept = [part for part in _spaced(argv) if part.lstrip("-").removeprefix("no").partition("=")[0] not in own_flags]
    varied = [_values(spec) for spec in values.vary]
    cells, auto_choices = {}, []  # what --auto chose
    for case, *settings, seed in itertools.product(values.case, *varied, values.seeds):
        name, colon, more = case.partition(":")
        if not colon or not seed.isdigit():
            raise InputError(f"--case={case} needs NAME: and flags, and --seeds={seed} whole numbers.")
        _add(cells, kept, name.strip(), settings, more, seed, say=auto_choices.append)
    cases = {cell.name["case"] for cell in cells.values()}
    for *settings, seed in itertools.product(*varied, values.seeds) if values.controls else ():
        words = [f"--{flag}={value}" for flag, value in settings]
        for name, (more, bare) in controls(cli.parse([*kept, *words], lambda _: None)).items():
            if name in cases:
                raise InputError(f"--case={name} is one of --controls too: give the case another name.")
            asked = [(flag, ANY if bare and flag in BUDGET else value) for flag, value in settings]
            try:
                kind = name if name in (BASE, BEST) else RUN
                _add(cells, kept, name, asked, more, seed, kind, auto_choices.append)
            except InputError as error:
                print(f"warning: the control {name!r} cannot be used with these flags ({error})", file=sys.stderr)
    if values.worker is None:
        print("".join(f"{line}\n" for line in dict.fromkeys(auto_choices)), end="", file=sys.stderr)
    return list(cells.values()), Options(pathlib.Path(values.out), values.parallel, values.worker)


def _add(cells, kept, case, settings, more, seed, kind=RUN, say=print):
    """Put one cell into `cells`, by what tells it from others."""
    words = [f"--{flag}={value}" for flag, value in settings if value != ANY]
    config = cli.parse([*kept, *words, *shlex.split(more), f"--seed={seed}", f"--split_seed={seed}"], say)
    if config.private_test.share:
        raise InputError(
            "--private_test cannot be used in a sweep: whoever chooses among cells by scores on private records has them pay for "
            "every cell. Sweep over public data with a public test set."
        )
    name = {"case": case, **dict(settings), "seed": int(seed), "config": _digest(config, kind)}
    cells[key(name)] = Cell(name, config, kind)


def settings(cell):
    """What tells the cell's flags from others', whatever its seed: means are over cells that have this in common. What --auto
    makes of sizes, which follow the seed, is left out."""
    chosen_by_size = ("expected_batch_size", "client_lr", "head_lr") if cell.config.output.auto else ()
    free = {name: FIELDS[name].default for name in chosen_by_size}
    return _digest(replace(cell.config, seed=None, split_seed=0, **free), cell.kind)


def _digest(config, kind):
    """Of all that decides a cell's outcome. Flags at their defaults are left out, of which a later version may have more."""
    values, defaults = to_flat(config), to_flat(RunConfig())
    decided = {name: values[name] for name in deciding(RESULT, METRICS) if values[name] != defaults[name]}
    decided |= {"kind": kind}
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:12]


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
