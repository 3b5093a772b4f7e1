"""The kinds of noise by name: a new kind is a file with a `noise.Noise`, and a line here. No JAX until one is looked up."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

from dplora_jax.privacy import clippers


class Kind(NamedTuple):
    """What a configuration has to know of a kind of noise: the `module` and the `name` of its class, whether it is `gaussian`, of
    the standard deviation that `accounting.Mechanism` accounts in every coordinate, whether its draws are `correlated` over
    steps or rounds, which fields belong to it, {field: value} of what is not given, and `checks(config, mode)`: (holds, what to
    say if not) for a config whose defaults are filled in, under the trust mode `mode` (`trust.mode.Mode`)."""

    module: str
    name: str
    gaussian: bool
    correlated: bool = False
    fields: tuple = ()
    defaults: Callable = lambda config: {}
    checks: Callable = lambda config, mode: ()


def _banded(config, mode):
    bands, steps = config.privacy.bands, config.schedule.local_steps
    yield (
        mode.public_uploads,
        f"noise=banded cannot be used with trust={mode.name}: it needs a client's own noise to carry its guarantee.",
    )
    yield mode.private, f"noise=banded cannot be used with trust={mode.name}."
    yield (
        not clippers.kind(config).moves,
        f"clipping={config.privacy.clipping} and noise=banded exclude each other: correlated noise has one scale.",
    )
    yield (
        bands > 1 and steps % bands == 0,
        f"noise=banded needs `local_steps` and `bands` of 2 or more, `bands` dividing local_steps={steps}.",
    )


def _banded_rounds(config, mode):
    privacy, schedule, aggregation = config.privacy, config.schedule, config.aggregation
    name = "noise=banded_rounds"
    yield (
        mode.private and mode.public_uploads,
        f"{name} cannot be used with trust={mode.name}: it needs a client's own noise to carry its guarantee. Use trust=local.",
    )
    yield (
        not clippers.kind(config).moves,
        f"clipping={privacy.clipping} and {name} exclude each other: correlated noise has one scale.",
    )
    yield (
        schedule.local_steps == 1,
        f"local_steps={schedule.local_steps} cannot be used with {name}, which takes one step in a round: use local_steps=1, or "
        "noise=banded.",
    )
    yield (
        privacy.bands is not None and 2 <= privacy.bands <= schedule.rounds,
        f"{name} needs `bands` of 2 or more, and no more than rounds={schedule.rounds}.",
    )
    yield (
        schedule.participation == "all" and not schedule.dropout,
        f"`participation` and `dropout` cannot be used with {name}: a round that a client is not in leaves noise that later "
        "rounds take back in vain. Leave them out.",
    )
    linear = {"aggregation": (aggregation.method, "fedavg"), "robust": (aggregation.robust, "none"),
              "upload_bits": (aggregation.upload_bits, None), "ranks": (config.lora.ranks, None),
              "server_optimizer": (aggregation.server_optimizer, "sgd"),
              "client_optimizer": (config.optimizer.client_optimizer, "sgd")}  # fmt: skip
    for field, (value, usual) in linear.items():
        yield (
            value == usual,
            f"{field}={value} cannot be used with {name}: rounds take back each other's noise only where the adapter is a sum of "
            f"them. {f'Use {field}={usual}' if usual else 'Leave it out'}.",
        )


def _hardened(config, mode):
    yield (
        mode.private and not mode.bare_clients,
        f"noise=hardened cannot be used with trust={mode.name}: no client adds noise there. Use trust=local or distributed.",
    )
    yield (
        not clippers.kind(config).moves,
        f"noise=hardened cannot be used with clipping={config.privacy.clipping}: its grid is fixed, and the clip norm moves. "
        "Use flat, per_layer or automatic.",
    )
    yield (
        config.aggregation.upload_bits is None,
        "`upload_bits` cannot be used with noise=hardened: it rounds by keys of the device, and hardened noise has no such keys. "
        "Leave one of them out.",
    )


KINDS = {
    "independent": Kind("dplora_jax.privacy.noise", "Independent", gaussian=True),
    "banded": Kind(
        "dplora_jax.privacy.banded",
        "Banded",
        gaussian=True,
        correlated=True,
        fields=("bands",),
        defaults=lambda config: {"bands": config.schedule.local_steps},
        checks=_banded,
    ),
    "banded_rounds": Kind(
        "dplora_jax.privacy.banded_rounds",
        "BandedRounds",
        gaussian=True,
        correlated=True,
        fields=("bands",),
        checks=_banded_rounds,
    ),
    "hardened": Kind("dplora_jax.privacy.hardened", "Hardened", gaussian=True, checks=_hardened),
}


def kind(name):
    """The class of the kind of noise that is called `name`."""
    return getattr(importlib.import_module(KINDS[name].module), KINDS[name].name)
