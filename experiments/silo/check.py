"""Hold a plan against one's own house, and approve it."""

import math

from absl import flags

from dplora_jax.errors import InputError
from dplora_jax.silos import plan
from experiments.silo import options
from experiments.silo.plan import summary

DIGITS = 32  # hex digits of a plan's digest that people compare
MOST_DELTA = 1e-3


def main(arguments):
    """Run the command line -> exit code."""
    from experiments.silo import party

    values = flags.FlagValues()
    define(values)
    path, values, workdir = options.read("check", arguments, values, "silo")
    made = options.planned(path)
    own = party.opened(made, values, workdir)
    name, epsilon = made.names[own.number], own.epsilon
    print(summary(made, own.about["clients"]))  # as reckoned here, and not as the plan says
    for statement in own.about["trust"]:
        print(f"  {statement}")
    _within(made, own.number, epsilon, values)
    digest = made.digest.hex()[:DIGITS]
    if values.digest != digest and not values.rehearsal:
        raise InputError(
            f"not approved yet: ask the other sites for the digest of their plan, by a way that is not the coordinator's; if all "
            f"have {digest}, give --digest={digest}."
        )
    print(f"The plan costs {name} epsilon {epsilon:.4f}, recomputed here, of at most {values.most_epsilon:g}.")
    print(f"Approved: send {plan.approve(workdir, made, name, own.keys.sign)} to the coordinator.")
    return 0


def define(values):
    """The command's own flags."""
    options.number("most_epsilon", "the most epsilon that this party agrees to", None, values)
    options.number("most_delta", "the most delta; default: 0.001, and below one in its records", None, values)
    flags.DEFINE_integer(
        "least_survivors",
        0,
        "trust=distributed: the fewest sites in whose total its upload may lie",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "least_colluding",
        1,
        "trust=distributed: how many colluding sites the noise must be enough for",
        flag_values=values,
    )
    flags.DEFINE_string(
        "digest", None, f"the first {DIGITS} digits of the plan's digest, as the other sites say it", flag_values=values
    )
    flags.DEFINE_boolean(
        "rehearsal",
        False,
        "approve without --digest, and a plan with a seed: for data that may be shown",
        flag_values=values,
    )


def _within(made, number, epsilon, values):
    """InputError where the plan is past a limit of this party."""
    privacy, limit = made.config.privacy, values.most_epsilon
    if limit is None:
        raise InputError("--most_epsilon is missing: say how much epsilon this party agrees to.")
    if privacy.seed is not None and not values.rehearsal:
        raise InputError("the plan has a seed, by which anyone can draw its noise and take it off: it has no privacy.")
    if not epsilon <= limit and not (values.rehearsal and math.isinf(epsilon)):
        spent = "has no privacy" if math.isinf(epsilon) else f"costs this party epsilon {epsilon:.4f}"
        raise InputError(f"the plan {spent}, past --most_epsilon={limit:g}.")
    most = min(MOST_DELTA, 1 / made.sizes[number]) if values.most_delta is None else values.most_delta
    if made.mode.private and privacy.delta > most:
        raise InputError(f"the plan's delta is {privacy.delta:g}, and this party agrees to --most_delta={most:g}.")
    if not made.mode.masked:
        return
    if privacy.survivors < values.least_survivors:
        raise InputError(
            f"the plan goes on with survivors={privacy.survivors}, below --least_survivors={values.least_survivors}."
        )
    if privacy.colluding < values.least_colluding:
        raise InputError(
            f"the plan's noise is enough for colluding={privacy.colluding}, below --least_colluding={values.least_colluding}."
        )
