"""What the flags of aggregation and participation must be, each alone and together. `config` is a `RunConfig` as given."""

import math

from dplora_jax.config import field_value
from dplora_jax.errors import InputError
from dplora_jax.federation import methods, participation, trust_modes

SERVER_OPTIMIZERS = ("sgd", "adam", "yogi", "adagrad")


def checks(config, trust):
    """(holds, what to say if not) for every flag of who takes part and how uploads are put together."""
    yield (
        config.aggregation.method in methods.BY_NAME,
        f"aggregation={config.aggregation.method} is not known: {', '.join(methods.BY_NAME)}.",
    )
    yield (
        config.aggregation.server_optimizer in SERVER_OPTIMIZERS,
        f"server_optimizer={config.aggregation.server_optimizer} is not known: {', '.join(SERVER_OPTIMIZERS)}.",
    )
    yield (
        config.aggregation.server_optimizer == "sgd" or not config.aggregation.server_momentum,
        f"`server_momentum` is of server_optimizer=sgd: {config.aggregation.server_optimizer} has moments of its own.",
    )
    yield from _one_by_one(config, trust)
    yield from _factors(config)
    yield from _robust(config)
    yield 0 <= config.optimizer.proximal < math.inf, f"proximal={config.optimizer.proximal} must be 0 or more."
    yield (
        not config.optimizer.proximal or config.schedule.local_steps > 1,
        "`proximal` pulls back to where the round began, which one local step never leaves: raise `local_steps`.",
    )
    yield (
        config.aggregation.upload_bits in (None, 4, 8),
        f"upload_bits={config.aggregation.upload_bits} is not known: 4 or 8.",
    )
    yield (
        config.aggregation.upload_bits is None or config.privacy.noise != "hardened",
        "`upload_bits` rounds by the device's own keys, which noise=hardened has none of: leave one of them out.",
    )
    yield (
        config.schedule.dropout is None or 0 <= config.schedule.dropout < 1,
        f"dropout={config.schedule.dropout} must lie in [0, 1).",
    )
    yield (
        config.schedule.dropout is None or trust != "client",
        "`dropout` with trust=client is `client_rate`: use that.",
    )
    try:
        participation.check(config.schedule.participation, config.schedule.clients)
    except InputError as error:
        yield False, str(error)


def _one_by_one(config, trust):
    """What needs each upload by itself."""
    others = {"aggregation": "fedavg", "robust": "none", "ranks": None, "upload_bits": None, "participation": "all"}
    for name, usual in others.items():
        yield (
            trust_modes.BY_NAME[trust].public_uploads or field_value(config, name) == usual,
            f"{name}={field_value(config, name)} handles each client's upload by itself, which trust={trust} does not: leave it "
            "out, or use trust=local.",
        )


def _factors(config):
    """What goes with which way of averaging factors."""
    for field, usual, reason in methods.BY_NAME[config.aggregation.method].refuses:
        given = field_value(config, field)
        yield (
            given == usual,
            f"--{field}={given} cannot be used with aggregation={config.aggregation.method}: {reason}; "
            f"{_instead(field, usual)}.",
        )
    if config.lora.ranks is None:
        return
    parts = config.lora.ranks.split(",")
    known = all(part.strip().isdigit() and 1 <= int(part) <= config.lora.rank for part in parts)
    yield (
        known and len(parts) == config.schedule.clients,
        f"ranks={config.lora.ranks} must be a whole number from 1 to rank={config.lora.rank} for each of {config.schedule.clients} clients.",
    )
    yield (
        not config.lora.freeze_a and not config.lora.head_only,
        "`ranks` cannot be used with `freeze_a` or `head_only`: a rank is of an A and a B that are trained.",
    )


def _instead(field, usual):
    """What to do about a field that is to be `usual`."""
    if usual is None or usual is False:
        return "leave it out"
    return f"use --{field}={usual:g}" if isinstance(usual, float) else f"use --{field}={usual}"


def _robust(config):
    """The robust means."""
    kind, _, share = config.aggregation.robust.partition(":")
    try:
        sound = config.aggregation.robust in ("none", "median") or (kind == "trimmed_mean" and 0 < float(share) < 0.5)
    except ValueError:
        sound = False
    yield (
        sound,
        f"robust={config.aggregation.robust} is malformed: none, median, or trimmed_mean:SHARE with SHARE below 0.5.",
    )
    yield (
        config.aggregation.robust == "none" or config.lora.ranks is None,
        f"robust={config.aggregation.robust} takes the place of a mean of like uploads, and `ranks` makes them unlike: leave one of them "
        "out.",
    )
