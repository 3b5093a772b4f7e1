"""The command line of a run: absl flags and flagfiles at the edge, one frozen RunConfig (`run_config`) at once behind it."""

import dataclasses
import math

from absl import flags

from dplora_jax.errors import InputError
from experiments import flag_checks, flagfiles, private_files
from experiments.run_config import RunConfig, number


def parse(argv, say=print):
    """The command line (without the program's name) -> RunConfig; InputError with one sentence on anything wrong. `say` is
    told what --auto chose."""
    values, flagfile = read(argv, flags.FlagValues(), "python -m experiments.run --flagfile=finance.flags [flags]")
    workdir = values.workdir or f"runs/{flagfile or values.dataset}"
    with private_files.reasons_in(workdir):
        given = chosen(values, say)
    return resolve(dataclasses.replace(given, workdir=workdir))


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
    rest, flagfile = flagfiles.parse(argv, values, "run")
    if values.help:
        print(f"{usage}\n{values.get_help()}")
        raise SystemExit(0)
    flagfiles.refuse_rest(rest)
    return values, flagfile


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
