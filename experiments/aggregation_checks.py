"""What the flags of aggregation and participation must be, each alone and together. `config` is a `flags.RunConfig` as given."""

import math

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
        config.aggregation in AGGREGATIONS,
        f"--aggregation={config.aggregation} is not known: {', '.join(AGGREGATIONS)}.",
    )
    yield (
        config.server_optimizer in SERVER_OPTIMIZERS,
        f"--server_optimizer={config.server_optimizer} is not known: {', '.join(SERVER_OPTIMIZERS)}.",
    )
    yield (
        config.server_optimizer == "sgd" or not config.server_momentum,
        f"--server_momentum is of --server_optimizer=sgd: {config.server_optimizer} has moments of its own.",
    )
    yield from _one_by_one(config, trust)
    yield from _factors(config)
    yield from _robust(config)
    yield 0 <= config.proximal < math.inf, f"--proximal={config.proximal} must be 0 or more."
    yield (
        not config.proximal or config.local_steps > 1,
        "--proximal pulls back to where the round began, which one local step never leaves: raise --local_steps.",
    )
    yield config.upload_bits in (None, 4, 8), f"--upload_bits={config.upload_bits} is not known: 4 or 8."
    yield (
        config.upload_bits is None or config.noise != "hardened",
        "--upload_bits rounds by the device's own keys, which --noise=hardened has none of: leave one of them out.",
    )
    yield config.dropout is None or 0 <= config.dropout < 1, f"--dropout={config.dropout} must lie in [0, 1)."
    yield config.dropout is None or trust != "client", "--dropout with --trust=client is --client_rate: use that."
    try:
        participation.check(config.participation, config.clients)
    except InputError as error:
        yield False, str(error)


def _one_by_one(config, trust):
    """What needs each upload by itself."""
    others = {"aggregation": "fedavg", "robust": "none", "ranks": None, "upload_bits": None, "participation": "all"}
    for name, usual in others.items():
        yield (
            trust in ("local", "none") or getattr(config, name) == usual,
            f"--{name}={getattr(config, name)} handles each client's upload by itself, which --trust={trust} does not: leave it "
            "out, or use --trust=local.",
        )


def _factors(config):
    """What goes with which way of averaging factors."""
    usual = config.aggregation == "fedavg"
    yield (
        usual or not config.head_only,
        f"--aggregation={config.aggregation} is of LoRA matrices: leave out --head_only.",
    )
    yield (
        usual or not config.freeze_a,
        f"--freeze_a with --aggregation={config.aggregation}: with A frozen the mean of B is exact already; leave one of them "
        "out.",
    )
    yield (
        (config.quantize is None and config.dtype == "float32") or config.aggregation not in ("fedex", "flora"),
        f"--aggregation={config.aggregation} folds into the base what --quantize and --dtype=bfloat16 would round "
        "away: use --dtype=float32.",
    )
    for name, usual in (("server_lr", 1.0), ("lr_decay", 1.0)):
        yield (
            getattr(config, name) == usual or config.aggregation not in ("fedex", "flora", "flexlora"),
            f"--{name}={getattr(config, name):g} does not go with --aggregation={config.aggregation}: the mean product is "
            f"taken as it is; use --{name}=1.",
        )
    yield (
        not config.ema or config.aggregation not in NO_AVERAGE,
        f"--ema={config.ema:g} does not go with --aggregation={config.aggregation}: {NO_AVERAGE.get(config.aggregation)}; use "
        "--ema=0.",
    )
    if config.ranks is None:
        return
    parts = config.ranks.split(",")
    whole = all(part.strip().isdigit() and 1 <= int(part) <= config.rank for part in parts)
    yield (
        whole and len(parts) == config.clients,
        f"--ranks={config.ranks} must be a whole number from 1 to --rank={config.rank} for each of {config.clients} clients.",
    )
    yield (
        config.aggregation not in ("rolora", "fedsa") and not config.freeze_a and not config.head_only,
        "--ranks goes with --aggregation=fedavg, fedex, flora or flexlora, and with an A that is trained.",
    )


def _robust(config):
    """The robust means."""
    kind, _, share = config.robust.partition(":")
    try:
        sound = config.robust in ("none", "median") or (kind == "trimmed_mean" and 0 < float(share) < 0.5)
    except ValueError:
        sound = False
    yield sound, f"--robust={config.robust} is malformed: none, median, or trimmed_mean:SHARE with SHARE below 0.5."
    yield (
        config.robust == "none" or (config.aggregation in ("fedavg", "rolora") and config.ranks is None),
        f"--robust={config.robust} takes the place of a mean of like uploads: use --aggregation=fedavg or rolora, "
        "without --ranks.",
    )
