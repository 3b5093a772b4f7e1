"""A site's own house, held against a plan: its keys, its base model, its table."""

from typing import Any, NamedTuple

import numpy as np

from dplora_jax import config_checks, models
from dplora_jax.errors import InputError
from dplora_jax.federation import held_out
from dplora_jax.finetuning import parties, setup
from dplora_jax.models import features
from dplora_jax.silos import draft, keys, plan, vectors
from experiments import cli
from experiments.silo import options


class Party(NamedTuple):
    """What a site works with: its number in the plan, its keys, its configuration, its `setup.Base` and its rows (dict of
    arrays)."""

    number: int
    keys: keys.Keys
    config: Any
    base: Any
    rows: dict
    epsilon: float  # of all planned rounds, recomputed
    about: dict  # what config.json says of the federation, made here


def opened(made, values, workdir):
    """The Party whose keys are in `workdir`, by what `made`, a Plan, says and the command line adds. Raises InputError where its
    keys, its model's files, its labels, its number of records or the shape of its adapter are not the plan's."""
    own_keys, card = keys.load(workdir), keys.read_card(workdir / keys.CARD)
    number = made.number(card["name"])
    epsilon = plan.own_epsilon(made, number)
    expected = {"ed25519": keys.public(own_keys.sign).hex(), "x25519": keys.public(own_keys.agree).hex()}
    for name, value in expected.items():
        if made.sites[number][name] != value:
            raise InputError(
                f"the plan has another {name} key of {card['name']} than this party's own: somebody swapped it."
            )
    with cli.speaking_of_flags():
        config = plan.config_of(made, options.own(values))
        config_checks.refuse(config)
        files = models.file_digests(config.base.name)
        if files != made.body["model"]:
            raise InputError(f"the base model {config.base.name} here has other files than the plan's: use the same.")
        base = parties.public(config, {"federation": {features.KEY: made.body["measured"]}})
        rows = base.objective.train(parties.own_records(config))
    count = len(np.unique(held_out.units_of(rows)))
    if count != made.sizes[number]:
        raise InputError(f"{card['name']} has {count} records, and the plan is for {made.sizes[number]}.")
    about, bits, adapter = draft.describe(config, base.model, base.params, made.sites, made.mechanisms)
    if vectors.layout(adapter) != made.layout:
        raise InputError(
            "the plan's adapter has another shape than this party's: its labels or its kind of task differ."
        )
    if bits != made.bits:
        raise InputError(f"the plan's grid of integers is 2^-{made.bits}, and 2^-{bits} follows from its noise.")
    described = setup.describe(config, base, sum(made.sizes), "")
    return Party(number, own_keys, config, base, rows, epsilon, about | described | {"environment": {}})
