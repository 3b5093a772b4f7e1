"""Attack the training program itself and bound from below the epsilon that it has: `python -m experiments.audit`.

Exit codes: 0 no bound exceeds its claim, 1 one does (the mechanism is broken; with an intact one this has
probability 0.001 at most, however many claims are audited), 2 bad input, 74 a file cannot be written.
"""

import sys
from typing import NamedTuple

import numpy as np
from absl import flags as absl_flags

from dplora_jax import guard, private_files
from dplora_jax.config import replace, to_flat
from dplora_jax.errors import InputError
from dplora_jax.federation import storage, trust
from dplora_jax.files import plain, to_json
from dplora_jax.privacy import auditing, chain
from experiments import cli
from experiments.attacks.canaries import audit, from_config, small
from experiments.cli import exits

EPSILONS = (1.0, 2.0, 4.0, 8.0)  # the claims on the small model
HELP = """python -m experiments.audit [--flagfile=finance.flags and flags of experiments.run] [flags]
  --runs=N        how often the whole training runs, with new coins and new noise (default 8)
  --canaries=N    canaries of each client (default 1)
  --epsilons=1,2  the claims to audit (default 1,2,4,8; of a configuration, its own)
  --audit_seed=S  makes coins and noise reproducible
  --membership    instead, train to the end and tell members from test records by the finished adapter's losses
Without any flag of experiments.run, a small random model is audited: 1,200 clients of 2 records, 4 rounds, full batches.
"""


@exits.guarded
def main(argv=None):
    """Run the command line `argv` (default: this process's) -> exit code."""
    guard.begin(phrase=cli.as_flags)
    options, config = _parse(sys.argv[1:] if argv is None else argv)
    if options.help:
        print(HELP)
        return 0
    with storage.locked(options.folder) as folder, private_files.reasons_in(folder):
        if (folder / "config.json").exists():
            raise InputError(f"--workdir={folder} holds a run: an audit needs a directory of its own.")
        return (_membership if options.membership else _audits)(options, config, folder)


class Options(NamedTuple):
    """The audit's own flags."""

    runs: int
    canaries: int
    epsilons: tuple
    seed: int | None
    membership: bool
    help: bool
    folder: str


def _parse(argv):
    """The command line -> (Options, RunConfig or None for the small model); raises InputError."""
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_integer("runs", 8, "", lower_bound=1, flag_values=values)
    absl_flags.DEFINE_integer("canaries", 1, "", lower_bound=1, flag_values=values)
    absl_flags.DEFINE_list("epsilons", None, "", flag_values=values)
    absl_flags.DEFINE_integer("audit_seed", None, "", lower_bound=0, flag_values=values)
    absl_flags.DEFINE_boolean("membership", False, "", flag_values=values)
    absl_flags.DEFINE_boolean("help", False, "", short_name="h", flag_values=values)
    mine = [arg for arg in argv if arg.lstrip("-").removeprefix("no").partition("=")[0] in values]
    others = [arg for arg in argv if arg not in mine]
    try:
        rest = values(["audit", *mine])[1:]
        epsilons = tuple(float(x) for x in values.epsilons or ())
    except (absl_flags.Error, ValueError) as error:
        raise InputError(f"{' '.join(str(error).split())} (the audit's own flags are written --name=value).") from None
    if rest or not all(0 < x <= 100 for x in epsilons):
        raise InputError(f"--epsilons={','.join(values.epsilons)}: each must lie above 0, at most 100.")
    run_flags = [arg for arg in others if not arg.lstrip("-").startswith("workdir")]
    config = cli.parse(others) if run_flags else None
    named = next((arg.partition("=")[2] for arg in others if arg.lstrip("-").startswith("workdir=")), None)
    folder = named or (f"{config.output.workdir}-audit" if config else "runs/audit")
    options = Options(values.runs, values.canaries, epsilons, values.audit_seed, values.membership, values.help, folder)
    return options, config


def _audits(options, config, folder):
    """Audit each claim, print and write what was reached -> exit code."""

    claims = len(options.epsilons) or (1 if config else len(EPSILONS))
    confidence = 1 - (1 - auditing.CONFIDENCE) / claims  # of each claim, so that the exit code has CONFIDENCE
    least, highest = auditing.reach(config.privacy.delta if config else 1e-5, confidence)
    beaten = f"a claim of 1 is beaten by {least} right of {least}" if least else "no claim of 1 is beaten"
    print(
        f"All bounds together hold with confidence {auditing.CONFIDENCE:.1%}: those of each of {claims} claims with "
        f"{confidence:.3%}. By guesses alone {beaten} at this delta, and nothing passes "
        f"{highest:.2f}. The curve reaches further: it is the accounted mechanism's own."
    )
    print(f"{'claim':>8}{'by guesses':>12}{'by the curve':>14}  score, error rates at most")
    lines = []
    for subject in _subjects(options, config):
        rng = np.random.default_rng(options.seed)
        claim, bound = audit(subject, options.runs, options.canaries, rng, confidence=confidence)
        broken = max(bound.guesses, bound.curve or 0) > claim
        curve = "-" if bound.curve is None else f"{bound.curve:.3f}"
        rates = f"{bound.false_positive:.4f} and {bound.false_negative:.4f}"
        print(f"{claim:8.3f}{bound.guesses:12.3f}{curve:>14}  {bound.score}, {rates}{'  BROKEN' * broken}", flush=True)
        lines.append({"claim": claim, "broken": broken, **bound._asdict()})
    result = {
        "confidence": auditing.CONFIDENCE,
        "confidence_of_each_claim": confidence,
        "runs": options.runs,
        "canaries_per_client": options.canaries,
        "seed": options.seed,
        "right_guesses_that_beat_a_claim_of_1": least,
        "highest_bound_by_guesses": highest,
        "flags": _flags(options, config),
        "audits": lines,
    }
    chain.replace_durably(folder / "audit.json", to_json(result, indent=1))
    if any(line["broken"] for line in lines):
        print("The mechanism is BROKEN: a lower bound exceeds the epsilon that is claimed.")
        return 1
    return 0


def _flags(options, config):
    """The flags that were audited, None of the small model; the claims stand for a budget where --epsilons names them."""
    if config is None:
        return None
    budget = ("epsilon", "noise_multiplier") if options.epsilons else ()
    return {name: value for name, value in plain(to_flat(config)).items() if name not in budget}


def _subjects(options, config):
    if config is None:
        return (small(epsilon) for epsilon in options.epsilons or EPSILONS)
    if not options.epsilons:
        return (from_config(config),)
    return (from_config(replace(config, epsilon=value, noise_multiplier=None)) for value in options.epsilons)


def _membership(options, config, folder):
    """Membership inference against the finished adapter, without privacy and with the configuration's -> exit code."""
    from experiments.attacks import membership

    if config is None:
        raise InputError("--membership needs a configuration: give --flagfile, with a test set or --test_fraction.")
    if not trust.mode(config).private:
        raise InputError("--membership compares a private run with one without: give --epsilon or --noise_multiplier.")
    bare = replace(config, trust="none", epsilon=None, noise_multiplier=None)
    if not config.base.feature_norm:  # whose rates are for clipped gradients, and would train too little to attack
        bare = replace(bare, clip_norm=float("inf"))
    print(private_files.NOTE)
    print(f"{'run':>14}{'TPR at 0.1% FPR':>18}{'at 1% FPR':>12}{'AUC':>8}")
    lines = []
    for name, one in ("no privacy", bare), ("as configured", config):
        line = membership.attack(one, options.seed)
        print(f"{name:>14}{line['tpr_at_0.001']:18.4f}{line['tpr_at_0.01']:12.4f}{line['auc']:8.3f}", flush=True)
        lines.append({"run": name, **line})
    private_files.write(folder / "membership.json", {"runs": lines})
    return 0
