"""Hold a plan against one's own house, and approve it."""

import math

from absl import flags

from dplora_jax.errors import InputError
from dplora_jax.silos import plan
from experiments.silo import options
from experiments.silo.plan import summary


def main(arguments):
    """Run the command line -> exit code."""
    from experiments.silo import party

    values = flags.FlagValues()
    options.number("most_epsilon", "the most epsilon that this party agrees to", None, values)
    flags.DEFINE_integer(
        "least_survivors",
        0,
        "trust=distributed: the fewest sites in whose total this party's share may lie",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "least_honest", 1, "trust=distributed: the fewest sites whose noise must be honest", flag_values=values
    )
    path, values, workdir = options.read("check", arguments, values, "silo")
    made = options.planned(path)
    own = party.opened(made, values, workdir)
    epsilon, privacy = plan.own_epsilon(made, own.number), made.config.privacy
    limit = values.most_epsilon
    if limit is None:
        raise InputError("--most_epsilon is missing: say how much epsilon this party agrees to.")
    if not epsilon <= limit:
        spent = "has no privacy" if math.isinf(epsilon) else f"costs this party epsilon {epsilon:.4f}"
        raise InputError(f"the plan {spent}, past --most_epsilon={limit:g}.")
    if made.mode.masked:
        if privacy.survivors < values.least_survivors:
            raise InputError(
                f"the plan goes on with survivors={privacy.survivors}, below --least_survivors={values.least_survivors}."
            )
        if privacy.survivors - privacy.colluding < values.least_honest:
            raise InputError(
                f"the plan counts on the noise of {privacy.survivors - privacy.colluding} sites, below "
                f"--least_honest={values.least_honest}."
            )
    name = made.names[own.number]
    print(summary(made))
    for statement in made.body["federation"]["trust"]:
        print(f"  {statement}")
    print(f"The coordinator's key begins with {made.coordinator['ed25519'][:16]}: make sure that it is theirs.")
    print(f"The plan costs {name} epsilon {epsilon:.4f}, recomputed here, of at most {limit:g}.")
    print(f"Approved: send {plan.approve(workdir, made, name, own.keys.sign)} to the coordinator.")
    return 0
