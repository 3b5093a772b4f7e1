"""From a configuration, a base model and the parties' cards to the body of a plan."""

import hashlib

from dplora_jax import config_checks
from dplora_jax.config import replace
from dplora_jax.data.partition import FOLDERS
from dplora_jax.federation import calibration, description, mesh, program, silo_checks, trust
from dplora_jax.files import plain
from dplora_jax.silos import plan, vectors


def draft(config, model, params, cards, coordinator, base_files, described=None, measured=None, start=None):
    """(the body of the plan of `config`, a RunConfig, for parties with these `cards`; the adapter before round 1, float32 [D]).

    `model` and `params` are the base, `base_files` the digests of its files, `coordinator` its card; `described` is what
    config.json is to say besides, `measured` what public text told of the base (`finetuning.public_text`), and `start` that
    adapter as a tree where it is not a fresh one (`finetuning.warm_start`). Raises InputError.
    """
    config = config_checks.settle(replace(config, clients=len(cards), partition=FOLDERS, mesh="1x1"))
    silo_checks.check(config)
    mechanisms = calibration.mechanisms(config, [card["records"] for card in cards])
    about, bits, adapter = describe(config, model, params, cards, mechanisms)
    start = vectors.flat(adapter if start is None else start)
    about = about | (described or {}) | {"environment": {}, "base_files": base_files}
    body = {
        "format": plan.FORMAT,
        "config": plan.public_config(config),
        "model": base_files,
        "layout": vectors.layout(adapter),
        "start": hashlib.sha256(start.astype("<f4")).hexdigest(),
        "bits": bits,
        "sites": cards,
        "coordinator": coordinator,
        "federation": plain(about),
        "measured": measured,
    }
    return body, start


def describe(config, model, params, cards, mechanisms):
    """(what config.json says of the federation, the grid of masked integers or None, the adapter before round 1) of a settled
    `config` for parties with these `cards` and `mechanisms`: the coordinator drafts by it, and a site holds a plan against it."""
    sizes = [card["records"] for card in cards]
    adapter, _, _ = program.adapter(config, model, params)
    noise = program.noise(config, mechanisms, sizes, adapter)
    about = description.describe(
        config, sizes, mechanisms, model, adapter, mesh.make("1x1", 1, model), noise, apart=True
    )
    for row, card in zip(about["clients"], cards, strict=True):
        row["name"] = card["name"]
    return about, noise.bits if trust.mode(config).masked else None, adapter
