"""What the fields of aggregation and participation must be, each alone and together."""

from dplora_jax.config import field_value, fields
from dplora_jax.errors import InputError
from dplora_jax.federation import methods, participation, trust


def checks(config):
    """(holds, what to say if not) for every field of who takes part and how uploads are put together."""
    yield (
        config.aggregation.server_optimizer == "sgd" or not config.aggregation.server_momentum,
        (
            f"`server_momentum` cannot be used with server_optimizer={config.aggregation.server_optimizer}, which has "
            "moments of its own: leave it out, or use sgd."
        ),
    )
    yield from _one_by_one(config)
    yield from _factors(config)
    yield from _robust(config)
    yield (
        not config.optimizer.proximal or config.schedule.local_steps > 1,
        "`proximal` needs `local_steps` of 2 or more: it pulls later steps back to where the round began.",
    )
    try:
        participation.check(config.schedule.participation, config.schedule.clients)
    except InputError as error:
        yield False, str(error)


def _one_by_one(config):
    """What needs each upload by itself."""
    others = {"aggregation": "fedavg", "robust": "none", "ranks": None, "upload_bits": None, "participation": "all"}
    for name, usual in others.items():
        yield (
            trust.mode(config).public_uploads or field_value(config, name) == usual,
            f"{name}={field_value(config, name)} works on each client's upload, and trust={config.privacy.trust} shows none: "
            "leave it out, or use trust=local.",
        )


def _factors(config):
    """What goes with which way of averaging factors."""
    for field, usual, reason in methods.BY_NAME[config.aggregation.method].refuses:
        if field not in fields(config):
            continue
        given = field_value(config, field)
        yield (
            given == usual,
            f"{field}={given} cannot be used with aggregation={config.aggregation.method}: {reason}; "
            f"{_instead(field, usual)}.",
        )
    if config.lora.ranks is None:
        return
    ranks = config.lora.ranks
    yield (
        all(1 <= rank <= config.lora.rank for rank in ranks) and len(ranks) == config.schedule.clients,
        f"ranks={','.join(map(str, ranks))} must be a whole number from 1 to rank={config.lora.rank} for each of "
        f"{config.schedule.clients} clients.",
    )
    yield (
        not (config.lora.freeze_a or config.lora.head_only or config.lora.core),
        "`ranks` cannot be used with `freeze_a`, `core` or `head_only`: a client's rank needs a trained A and a trained B.",
    )


def _instead(field, usual):
    """What to do about a field that is to be `usual`."""
    if usual is None or usual is False:
        return "leave it out"
    return f"use {field}={usual:g}" if isinstance(usual, float) else f"use {field}={usual}"


def _robust(config):
    """The robust means."""
    kind, _, share = config.aggregation.robust.partition(":")
    try:
        sound = config.aggregation.robust in ("none", "median") or (kind == "trimmed_mean" and 0 < float(share) < 0.5)
    except ValueError:
        sound = False
    yield (
        sound,
        (
            f"robust={config.aggregation.robust} is malformed: write none, median, or trimmed_mean:SHARE with SHARE below "
            "0.5."
        ),
    )
    yield (
        config.aggregation.robust == "none" or config.lora.ranks is None,
        f"robust={config.aggregation.robust} compares uploads of one shape, and `ranks` gives them several: leave one of them "
        "out.",
    )
