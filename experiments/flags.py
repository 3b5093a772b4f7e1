"""The command line of a run: absl flags and flagfiles at the edge, one frozen RunConfig (`run_config`) at once behind it."""

import dataclasses
import math
import pathlib

from absl import flags

from dplora_jax.errors import InputError
from experiments import flag_checks
from experiments.run_config import RunConfig, number

SHIPPED = pathlib.Path(__file__).parent.parent  # where the project's own flagfiles lie


def parse(argv, say=print):
    """The command line (without the program's name) -> RunConfig; InputError with one sentence on anything wrong. `say` is
    told what --auto chose."""
    values, flagfile = read(argv, flags.FlagValues(), "python -m experiments.run --flagfile=finance.flags [flags]")
    given = chosen(values, say)
    return resolve(dataclasses.replace(given, workdir=given.workdir or f"runs/{flagfile or given.dataset}"))


def chosen(values, say=print):
    """The run's flags among absl's `values`, unchecked, with what --auto chooses for those that are not given -> RunConfig."""
    given = raw(values)
    if not given.auto:
        return given
    from experiments import recipe  # here, since it reads the data

    choices = recipe.for_run(given, {name for name in values if values[name].present})
    say("--auto chose " + " ".join(f"--{name}={value}" for name, value in choices.items()))
    return dataclasses.replace(given, **choices)


def without_auto(config):
    """`config`; InputError where it asks for --auto, which reads a run's records."""
    if config.auto:
        raise InputError(
            "--auto chooses when a run has read its records: give the flags that it chose, which the run says."
        )
    return config


def raw(values):
    """The run's flags among absl's `values`, unchecked -> RunConfig, its numbers possibly text still."""
    return RunConfig(**{field.name: values[field.name].value for field in dataclasses.fields(RunConfig)})


def read(argv, values, usage):
    """Read the run's flags, and those that `values` defines already, into `values` -> (values, the last flagfile's name)."""
    define = {
        bool: flags.DEFINE_boolean,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    for field in dataclasses.fields(RunConfig):
        kind = next(t for t in define if field.type is t or field.type == t | None)
        define[kind](field.name, field.default, field.metadata["help"], flag_values=values)
    flags.DEFINE_boolean("help", False, "show this help", short_name="h", flag_values=values)
    argv, flagfile = _find_flagfiles(argv)
    try:
        rest = values(["run", *argv])[1:]
    except flags.Error as error:
        raise InputError(" ".join(str(error).split())) from None
    if values.help:
        print(f"{usage}\n{values.get_help()}")
        raise SystemExit(0)
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}: every option is a --flag.")
    return values, flagfile


def _find_flagfiles(argv):
    """Each --flagfile that is not in the current folder is looked for among the shipped ones -> (argv, last one's name)."""
    out, name = [], None
    spaced = iter(argv)
    for arg in spaced:
        option, equals, value = arg.partition("=")
        if option.lstrip("-") == "flagfile" and option.startswith("-"):
            value = value if equals else next(spaced, "")
            path = pathlib.Path(value)
            path = next((p for p in (path, SHIPPED / value, SHIPPED / "flagfiles" / value) if p.is_file()), path)
            if not value or not path.is_file():
                shipped = ", ".join(
                    sorted(p.name for p in (*SHIPPED.glob("*.flags"), *SHIPPED.glob("flagfiles/*.flags")))
                )
                raise InputError(f"flagfile {value!r} is neither here nor among the shipped ones ({shipped}).")
            arg, name = f"--flagfile={path}", path.stem
        out.append(arg)
    return out, name


def resolve(config):
    """Check every flag against the others and settle what follows from them -> RunConfig with numbers for numbers."""
    budget, sigma = number(config.epsilon, "epsilon"), number(config.noise_multiplier, "noise_multiplier")
    if config.trust not in ("local", "distributed", "client", "none"):
        raise InputError(f"--trust={config.trust} is not known: local, distributed, client or none.")
    if budget is not None and sigma is not None:
        raise InputError("--epsilon and --noise_multiplier exclude each other; --epsilon=none unsets a flagfile's.")
    trust = "none" if budget == math.inf else config.trust
    if trust == "none":
        budget = sigma = None
    elif budget is None and sigma is None:
        raise InputError(f"--trust={trust} needs --epsilon or --noise_multiplier; --trust=none runs without privacy.")
    flag_checks.refuse(config, trust, budget, sigma)
    if config.dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype={config.dtype} is not known: float32 or bfloat16.")
    if config.quantize is not None:
        from dplora_jax.models.quantized import KINDS  # here, since it imports JAX and `budget` has no need of that

        if config.quantize not in KINDS:
            raise InputError(f"--quantize={config.quantize} is not known: {' or '.join(KINDS)}.")
    return dataclasses.replace(flag_checks.settled(config, trust), trust=trust, epsilon=budget, noise_multiplier=sigma)
