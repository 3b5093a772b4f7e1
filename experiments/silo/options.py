"""What the silo commands read of their command lines."""

import pathlib

from absl import flags

from dplora_jax.config import FIELDS, to_flat
from dplora_jax.errors import InputError
from dplora_jax.silos import plan
from experiments import cli

USAGE = "python -m experiments.silo {} [PLAN] [flags]"


def read(command, arguments, values, default):
    """(the plan's path or None, absl's `values` of the run's flags and those that are defined already, the workdir)."""
    path = arguments[0] if arguments and not arguments[0].startswith("-") else None
    values, _ = cli.read(arguments[path is not None :], values, USAGE.format(command))
    return path, values, pathlib.Path(values.workdir or default)


def read_alone(command, arguments, values):
    """(the plan's path or None, absl's `values`) of a command that takes none of a run's flags."""
    path = arguments[0] if arguments and not arguments[0].startswith("-") else None
    cli.read_alone(arguments[path is not None :], values, command, USAGE.format(command))
    return path, values


def planned(path):
    """The Plan at `path`; InputError where none is given."""
    if path is None:
        raise InputError("give the plan's file behind the command.")
    return plan.read(path)


def own(values):
    """{flag: value} of what the command line gives of a party's own house, the base model's place included. InputError where it
    gives what the plan decides."""
    given = {name for name in FIELDS if values[name].present}
    decided = given - {*plan.LOCAL, "model"}
    if decided:
        raise InputError(f"--{sorted(decided)[0]} is the plan's to decide: leave it out.")
    flat = to_flat(cli.raw(values))
    return {name: flat[name] for name in given}


def address(text, flag):
    """(host, port) of HOST:PORT."""
    host, _, port = (text or "").rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise InputError(f"--{flag}={text} must be HOST:PORT.")
    return host.strip("[]"), int(port)


def number(name, text, default, flag_values):
    """Define a flag for a number of seconds or the like, which may be none."""
    flags.DEFINE_float(name, default, text, lower_bound=0.0, flag_values=flag_values)
