"""What the flags of aggregation and participation must be, each alone and together. `config` is a `RunConfig` as given."""

import math

from dplora_jax.config import field_value
from dplora_jax.errors import InputError
from dplora_jax.federation import participation

AGGREGATIONS = ("fedavg", "rolora", "fedsa", "fedex", "flora", "flexlora")
# Their server takes the factors as settled: an exact mean would be undone by a step of another length, and RoLoRA's halves,
# trained in turn, would be moved by a memory in the other's rounds. The server's momentum or moments are the head's alone.
WHOLE = ("rolora", "fedex", "flora", "flexlora")
SERVER_OPTIMIZERS = ("sgd", "adam", "yogi", "adagrad")
# Where an average over rounds makes no model, and why.
NO_AVERAGE = {
    "fedsa": "an average has no client's own B",
    **dict.fromkeys(("fedex", "flora", "flexlora"), "factors of several rounds do not average to their products' mean"),
}


def checks(config, trust):
    """(holds, what to say if not) for every flag of who takes part and how uploads are put together."""
    yield (
        config.aggregation.method in AGGREGATIONS,
        f"aggregation={config.aggregation.method} is not known: {', '.join(AGGREGATIONS)}.",
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
            trust in ("local", "none") or field_value(config, name) == usual,
            f"{name}={field_value(config, name)} handles each client's upload by itself, which trust={trust} does not: leave it "
            "out, or use trust=local.",
        )


def _factors(config):
    """What goes with which way of averaging factors."""
    usual = config.aggregation.method == "fedavg"
    yield (
        usual or not config.lora.head_only,
        f"aggregation={config.aggregation.method} is of LoRA matrices: leave out `head_only`.",
    )
    yield (
        usual or not config.lora.freeze_a,
        f"`freeze_a` with aggregation={config.aggregation.method}: with A frozen the mean of B is exact already; leave one of them "
        "out.",
    )
    yield (
        (config.base.quantize is None and config.base.dtype == "float32")
        or config.aggregation.method not in ("fedex", "flora"),
        f"aggregation={config.aggregation.method} folds into the base what `quantize` and dtype=bfloat16 would round "
        "away: use dtype=float32.",
    )
    for name, usual in (("server_lr", 1.0), ("lr_decay", 1.0)):
        yield (
            field_value(config, name) == usual or config.aggregation.method not in ("fedex", "flora", "flexlora"),
            f"{name}={field_value(config, name):g} does not go with aggregation={config.aggregation.method}: the mean product is "
            f"taken as it is; use {name}=1.",
        )
    yield (
        not config.aggregation.ema or config.aggregation.method not in NO_AVERAGE,
        f"ema={config.aggregation.ema:g} does not go with aggregation={config.aggregation.method}: {NO_AVERAGE.get(config.aggregation.method)}; use "
        "ema=0.",
    )
    if config.lora.ranks is None:
        return
    parts = config.lora.ranks.split(",")
    whole = all(part.strip().isdigit() and 1 <= int(part) <= config.lora.rank for part in parts)
    yield (
        whole and len(parts) == config.schedule.clients,
        f"ranks={config.lora.ranks} must be a whole number from 1 to rank={config.lora.rank} for each of {config.schedule.clients} clients.",
    )
    yield (
        config.aggregation.method not in ("rolora", "fedsa") and not config.lora.freeze_a and not config.lora.head_only,
        "`ranks` goes with aggregation=fedavg, fedex, flora or flexlora, and with an A that is trained.",
    )


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
        config.aggregation.robust == "none"
        or (config.aggregation.method in ("fedavg", "rolora") and config.lora.ranks is None),
        f"robust={config.aggregation.robust} takes the place of a mean of like uploads: use aggregation=fedavg or rolora, "
        "without `ranks`.",
    )
