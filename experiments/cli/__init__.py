"""The command line: a configuration's fields as absl flags, grouped, and flagfiles; one frozen RunConfig at once behind them.

The library speaks of fields (`rank`, rank=8), and here they become flags (--rank, --rank=8): in help texts and in errors.
"""

import contextlib
import math
import re
import textwrap

from absl import flags

from dplora_jax import config_checks, private_files
from dplora_jax.config import FIELDS, RunConfig, from_text, replace, to_flat
from dplora_jax.errors import InputError
from experiments.cli import flagfile_reader

GROUPS = {  # the sections of a RunConfig, as --help heads them
    "base": "Model",
    "data": "Data",
    "public": "Public records to train on first",
    "lora": "Adapter",
    "privacy": "Privacy",
    "private_test": "Scores on private records",
    "schedule": "Clients and rounds",
    "optimizer": "Clients' optimizer",
    "aggregation": "Server",
    "execution": "Execution",
    "evaluation": "Evaluation",
    "output": "Output",
}
EXAMPLES = """examples:
  python -m experiments.run --flagfile=finance.flags
  python -m experiments.run --flagfile=finance.flags --epsilon=2 --rounds=10 --workdir=runs/two
  python -m experiments.run --flagfile=finance.flags --dataset=csv --data_dir=my_data --text_column=body \\
      --label_column=class --labels=complaint,praise,other --workdir=runs/mine
"""
NAMES = "|".join(sorted(FIELDS, key=len, reverse=True))


class _OptionalNumber(flags.ArgumentParser):
    """An optional number: none is None; inf is allowed where it is a float."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def parse(self, argument):
        if argument is None or str(argument).lower() in ("none", ""):
            return None
        return self.kind(argument)

    def flag_type(self):
        return self.kind.__name__


def parse(argv, say=print):
    """The command line (without the program's name) -> RunConfig; InputError with one sentence on anything wrong. `say` is
    told what --auto chose."""
    values, flagfile = read(argv, flags.FlagValues(), "python -m experiments.run --flagfile=finance.flags [flags]")
    workdir = values.workdir or f"runs/{flagfile or values.dataset}"
    with private_files.reasons_in(workdir):
        given = chosen(values, say)
    return settle(replace(given, workdir=workdir))


def settle(config):
    """`config_checks.settle`, whose errors speak of flags here."""
    with speaking_of_flags():
        return config_checks.settle(config)


@contextlib.contextmanager
def speaking_of_flags():
    """Errors of the library that pass here speak of flags in place of fields."""
    try:
        yield
    except InputError as error:
        error.args = (as_flags(str(error)), *error.args[1:])
        raise


def as_flags(text):
    """`text` of the library with flags in place of fields: `rank` becomes --rank, and rank=8 becomes --rank=8."""
    text = str(text)
    text = re.sub(rf"`({NAMES})`", r"--\1", text)
    return re.sub(rf"(?<![\w.`-])({NAMES})=(?=[^\s=])", r"--\1=", text)


def chosen(values, say=print):
    """The run's flags among absl's `values`, unchecked, with what --auto chooses for those that are not given -> RunConfig."""
    given = raw(values)
    if not given.output.auto:
        return given
    from dplora_jax.finetuning import recipe  # here, since it reads the data

    with speaking_of_flags():
        choices = recipe.for_run(given, {name for name in values if values[name].present})
    config = replace(given, **choices)
    said = to_flat(config)  # as flags have it
    say(" ".join(["--auto chose", *(f"--{name}={said[name]}" for name in choices if said[name] is not None)]))
    return config


def without_auto(config):
    """`config`; InputError where it asks for --auto, which reads a run's records."""
    if config.output.auto:
        raise InputError(
            "--auto cannot be used here, since it chooses once a run has read its records: give the flags that the run "
            "says it chose."
        )
    return config


def raw(values):
    """The run's flags among absl's `values`, unchecked -> RunConfig."""
    with speaking_of_flags():
        return replace(RunConfig(), **{name: from_text(entry, values[name].value) for name, entry in FIELDS.items()})


def read(argv, values, usage):
    """Read the run's flags, and those that `values` defines already, into `values` -> (values, the last flagfile's name).

    --help prints the flags that matter to most, --helpfull all of them; both exit with 0.
    """
    more = [name for name in values if name not in ("help", "helpfull")]
    for entry in FIELDS.values():
        _define(entry, values)
    flags.DEFINE_boolean("help", False, "show the flags that matter most", short_name="h", flag_values=values)
    flags.DEFINE_boolean("helpfull", False, "show every flag", flag_values=values)
    rest, flagfile = flagfile_reader.parse(argv, values, "run")
    if values.help or values.helpfull:
        print(help_text(values, usage, more, full=values.helpfull))
        raise SystemExit(0)
    flagfile_reader.refuse_rest(rest)
    return values, flagfile


def read_alone(argv, values, program, usage):
    """Read the flags of a command that takes none of a run's into `values`. --help prints `usage` and them, and exits with 0."""
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    rest, _ = flagfile_reader.parse(argv, values, program)
    if values.help:
        print(f"{usage}\n{values.get_help()}")
        raise SystemExit(0)
    flagfile_reader.refuse_rest(rest)


def _define(entry, values):
    text = as_flags(entry.metadata["help"])
    default = ",".join(map(str, entry.default)) if isinstance(entry.default, tuple) else entry.default
    if entry.kind is bool:
        flags.DEFINE_boolean(entry.flag, default, text, flag_values=values)
    elif entry.kind in (int, float) and entry.optional:
        serializer = flags.ArgumentSerializer()
        flags.DEFINE(_OptionalNumber(entry.kind), entry.flag, default, text, values, serializer)
    else:
        define = {int: flags.DEFINE_integer, float: flags.DEFINE_float}.get(entry.kind, flags.DEFINE_string)
        define(entry.flag, default, text, flag_values=values)


def help_text(values, usage, more=(), full=False):
    """What --help (or, `full`, --helpfull) prints: `usage`, a command's own flags `more`, and the run's flags by section."""
    lines = [usage, ""]
    if more:
        lines += ["This command's own flags:", *(_entry(f"--{name}", values[name].help) for name in more), ""]
    for section, title in GROUPS.items():
        chosen = [f for f in FIELDS.values() if f.section == section and (full or f.metadata["common"])]
        if chosen:
            lines += [f"{title}:", *(_entry(f"--{f.flag}={_default(f)}", _meaning(f)) for f in chosen), ""]
    lines.append(EXAMPLES)
    if not full:
        lines.append("--helpfull lists every flag. A flagfile has a flag a line; flags behind it win.")
    return "\n".join(lines)


def _entry(name, text):
    return f"  {name}\n" + textwrap.fill(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _default(entry):
    if isinstance(entry.default, tuple):
        return ",".join(map(str, entry.default)) or "none"
    if isinstance(entry.default, float) and math.isfinite(entry.default):
        return f"{entry.default:g}"
    return str(entry.default).lower() if entry.default is None or entry.kind is bool else entry.default


def _meaning(entry):
    text, choices = as_flags(entry.metadata["help"]), entry.metadata.get("choices", ())
    names = ", ".join(map(str, choices))
    return f"{text} ({names})" if choices and not all(str(choice) in text for choice in choices) else text
