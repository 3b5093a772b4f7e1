"""Write and sign the plan, from the parties' public cards and a run's settings."""

import io

import numpy as np
from absl import flags

from dplora_jax.config import replace
from dplora_jax.errors import InputError
from dplora_jax.privacy.chain import replace_durably
from dplora_jax.silos import keys, plan
from experiments import cli
from experiments.silo import options


def main(arguments):
    """Run the command line -> exit code."""
    from dplora_jax import models
    from dplora_jax.finetuning import parties, setup, warm_start
    from dplora_jax.models import features
    from dplora_jax.silos import draft

    values = flags.FlagValues()
    flags.DEFINE_list("sites", None, "comma-separated card.json files of the sites", flag_values=values)
    _, values, workdir = options.read("plan", arguments, values, "coordinator")
    if not values.sites or len(values.sites) < 2:
        raise InputError("--sites is missing: give the card.json files of two or more sites.")
    cards = [keys.read_card(path) for path in values.sites]
    if (workdir / plan.FILE).exists():
        raise InputError(f"{workdir / plan.FILE} exists: sites may have approved it. Give another --workdir.")
    with cli.speaking_of_flags():
        given = replace(cli.without_auto(cli.raw(values)), clients=len(cards), partition="folders")
        config = cli.settle(given)
        base = parties.public(config)
        if not (workdir / "private" / keys.FILE).exists():
            keys.create(workdir, "coordinator", 0)
        own = keys.read_card(workdir / keys.CARD)
        public = warm_start.read(config, base.corpus)
        described = setup.describe(config, base, sum(card["records"] for card in cards), "", public)
        trained = public and parties.trained_first(config, base, public)
        if base.labels is not None:
            config = replace(config, labels=tuple(base.labels))
        files = models.file_digests(config.base.name)
        body, start = draft.draft(
            config, base.model, base.params, cards, own, files, described, described.pop(features.KEY, None), trained
        )
    content = io.BytesIO()
    np.save(content, start)
    replace_durably(workdir / plan.START, content.getvalue())
    made = plan.write(workdir, body, keys.load(workdir).sign)
    print(summary(made, made.body["federation"]["clients"]))
    print(f"Send {workdir / plan.FILE} to every site: each checks and approves it.")
    return 0


def summary(made, clients):
    """What a plan comes to, in lines; `clients` are the rows of config.json on all sites."""
    config, lines = made.config, []
    for row in clients:
        lines.append(
            f"{row['name']:>16}: {row['records']:6} records, sampling rate {row['sampling_rate']:.4f}, noise multiplier "
            f"{row['noise_multiplier']:.4f}, epsilon {row['epsilon']:.4f} at delta {config.privacy.delta:g}"
        )
    rounds = f"{config.schedule.rounds} rounds, trust={config.privacy.trust}"
    rounds += "" if config.privacy.seed is None else f", seed={config.privacy.seed}: NOT FOR RELEASE"
    if made.mode.masked:
        rounds += f", survivors={config.privacy.survivors}, colluding={config.privacy.colluding}"
    return "\n".join([*lines, f"{rounds}; plan {made.digest.hex()[:32]}"])
