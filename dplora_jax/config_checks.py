"""What a run's flags must be, each alone and together: a combination that has no guarantee, or no meaning, is refused.

`config` is a `RunConfig` as given.
"""

import math

from dplora_jax.config import field_value, replace
from dplora_jax.errors import InputError
from dplora_jax.federation import aggregation_checks
from dplora_jax.privacy import accounting, noises
from dplora_jax.privacy.accounting import MOST_NOISE, MOST_STEPS

# The flags of one trust mode alone, and what they are when not given.
DISTRIBUTED = {"survivors": lambda config: config.schedule.clients, "colluding": lambda _: 1}
MOST_PLACES = 5 * 10**7  # of the schedule of who is in which round
CLIENT = {"client_rate": lambda _: 1.0}


def parties(config, trust):
    """The trust mode's own flags, settled."""
    own = {"distributed": DISTRIBUTED, "client": CLIENT}.get(trust, {})
    given = {name: field_value(config, name) for name in own}
    settled = {name: default(config) if given[name] is None else given[name] for name, default in own.items()}
    return settled | ({"dropout": config.schedule.dropout or 0.0} if trust == "distributed" else {})


def settled(config, trust):
    """`config` with what follows from its flags for those that are not given."""
    head_lr = config.optimizer.client_lr if config.optimizer.head_lr is None else config.optimizer.head_lr
    bands = (config.privacy.bands or config.schedule.local_steps) if config.privacy.noise == "banded" else None
    return replace(config, **parties(config, trust), bands=bands, head_lr=head_lr)


def refuse(config, trust, budget, sigma):
    """Raise InputError with the first sentence that holds against `config`; `trust`, epsilon and sigma as settled."""
    several = (
        _ranges(config, trust, budget, sigma),
        _combinations(config, trust),
        _variants(config, trust),
        aggregation_checks.checks(config, trust),
        _processes(config),
    )
    for checks in several:
        for ok, sentence in checks:
            if not ok:
                raise InputError(sentence)
    if trust != "none":
        bands = (config.privacy.bands or config.schedule.local_steps) if config.privacy.noise == "banded" else 1
        steps = config.schedule.rounds * (1 if trust == "client" else config.schedule.local_steps)
        accounting.check_delta(config.privacy.delta, -(-steps // bands))


def _combinations(config, trust):
    """(holds, what to say if not) for the combinations of a trust mode's flags that have no guarantee, or no meaning."""
    for mode, own in (("distributed", DISTRIBUTED), ("client", CLIENT)):
        for name in own:
            given = field_value(config, name)
            yield (
                trust == mode or given is None,
                f"{name} belongs to trust={mode}: leave it out with trust={trust}.",
            )
    settled = parties(config, trust)
    if trust == "distributed":
        survivors, colluding = settled["survivors"], settled["colluding"]
        yield (
            config.schedule.local_steps == 1,
            f"local_steps={config.schedule.local_steps} with trust=distributed: only a total carries enough noise to be looked at, so "
            "a round is one step; use local_steps=1 and more `rounds`.",
        )
        yield (
            config.optimizer.client_optimizer == "sgd",
            f"client_optimizer={config.optimizer.client_optimizer} with trust=distributed: no client sees its gradient's noise, so the "
            "server holds all optimizer state; use sgd and `server_momentum`.",
        )
        yield (
            1 <= survivors <= config.schedule.clients,
            f"survivors={survivors} must lie between 1 and clients={config.schedule.clients}.",
        )
        yield (
            colluding >= 1,
            f"colluding={colluding} must be 1 or more: every client knows its own noise and may be the curious one.",
        )
        yield (
            survivors - colluding >= 1,
            f"trust=distributed with {survivors} surviving clients of which {colluding} collude leaves no honest noise: raise "
            "`clients` or `survivors`, or lower `colluding`.",
        )
    if trust == "client":
        rate = settled["client_rate"]
        yield 0 < rate <= 1, f"client_rate={rate} must lie above 0, at most 1."
        yield (
            config.privacy.delta * config.schedule.clients < 1,
            f"delta={config.privacy.delta:g} with trust=client must be below 1 / clients={config.schedule.clients}: at that delta, "
            "publishing one client's records whole would count as private.",
        )


def _ranges(config, trust, budget, sigma):
    """(holds, what to say if not) for each flag with a range."""
    private = trust != "none"
    yield (
        budget is None or 0 < budget <= 1000,
        f"epsilon={budget} must lie above 0, at most 1000 (inf for no privacy).",
    )
    yield (
        sigma is None or 0.05 <= sigma <= MOST_NOISE,
        f"noise_multiplier={sigma} must be 0.05 to {MOST_NOISE:g}; trust=none runs without noise.",
    )
    yield 0 < config.privacy.delta < 1, f"delta={config.privacy.delta} must lie between 0 and 1."
    yield config.privacy.clip_norm > 0, f"clip_norm={config.privacy.clip_norm} must be above 0."
    low, high = accounting.CLIP_NORMS
    yield (
        not private or config.privacy.clip_norm == math.inf or low <= config.privacy.clip_norm <= high,
        f"clip_norm={config.privacy.clip_norm} must lie in {low:g} to {high:g}: float32 cannot square smaller gradients.",
    )
    yield (
        not private or math.isfinite(config.privacy.clip_norm),
        "clip_norm=inf clips nothing: only trust=none allows it.",
    )
    for name in ("rounds", "local_steps", "clients", "rank", "dispatch_rounds", "wave", "max_length"):
        value = field_value(config, name)
        yield value is None or value >= 1, f"{name}={value} must be 1 or more."
    yield (
        config.schedule.rounds * config.schedule.local_steps <= MOST_STEPS
        and config.schedule.rounds * config.schedule.clients <= MOST_PLACES,
        f"rounds={config.schedule.rounds} must be at most {MOST_STEPS} over `local_steps`, and {MOST_PLACES} over `clients`.",
    )
    for name in ("microbatch", "last_layers", "train_records", "test_records", "benchmark_records", "new_tokens"):
        yield (
            field_value(config, name) is None or field_value(config, name) >= 1,
            f"{name}={field_value(config, name)} must be 1 or more.",
        )
    for name in ("client_lr", "server_lr", "expected_batch_size", "alpha"):
        yield 0 < field_value(config, name) < math.inf, f"{name}={field_value(config, name)} must be a number above 0."
    yield (
        0 <= config.base.feature_norm < math.inf,
        f"feature_norm={config.base.feature_norm} must be a number above 0, or 0 for features as they are.",
    )
    yield (
        not config.base.feature_norm or math.isfinite(config.privacy.clip_norm),
        "`feature_norm` makes gradients as long as it says, too long for clip_norm=inf: clip them, or leave it out.",
    )
    yield (
        config.optimizer.head_lr is None or 0 <= config.optimizer.head_lr < math.inf,
        f"head_lr={config.optimizer.head_lr} must be 0 or more.",
    )
    for name in ("ema", "server_momentum"):
        yield 0 <= field_value(config, name) < 1, f"{name}={field_value(config, name)} must lie in [0, 1)."
    yield 0 <= config.optimizer.lr_decay <= 1, f"lr_decay={config.optimizer.lr_decay} must lie in [0, 1]."
    for name in ("eval_every", "generate"):
        yield field_value(config, name) >= 0, f"{name}={field_value(config, name)} must be 0 or more."
    yield (
        config.data.party == 0 or (config.schedule.clients == 1 and 0 < config.data.party < (config.data.parties or 1)),
        f"party={config.data.party} is one of `parties`, with clients=1.",
    )
    objectives = ("auto", "classifier", "language_model")
    yield (
        config.data.objective in objectives,
        f"objective={config.data.objective} is not known: {', '.join(objectives)}.",
    )
    yield (
        config.data.parties is None
        or (config.data.parties >= config.schedule.clients and config.data.partition != "folders"),
        f"parties={config.data.parties} must be at least clients={config.schedule.clients}, of a table that is dealt.",
    )
    yield (
        config.optimizer.client_optimizer in ("sgd", "adam"),
        f"client_optimizer={config.optimizer.client_optimizer} is not known: sgd or adam.",
    )
    yield config.lora.head_only or config.lora.trained_targets, "`targets` is empty: `head_only` trains a head alone."


def _variants(config, trust):
    """(holds, what to say if not) for the flags of clipping and noise."""
    adaptive, banded, steps = (
        config.privacy.clipping == "adaptive",
        config.privacy.noise == "banded",
        config.schedule.local_steps,
    )
    hardened = config.privacy.noise == "hardened"
    bands = steps if config.privacy.bands is None else config.privacy.bands
    known = ("flat", "per_layer", "automatic", "adaptive")
    yield config.privacy.clipping in known, f"clipping={config.privacy.clipping} is not known: {', '.join(known)}."
    yield config.privacy.noise in noises.KINDS, f"noise={config.privacy.noise} is not known: {', '.join(noises.KINDS)}."
    yield (
        not hardened or trust == "local",
        f"noise=hardened is of trust=local: rounded shares are no rounded total; leave it out of trust={trust}.",
    )
    yield (
        not (hardened and adaptive),
        "noise=hardened needs a grid that stays: clipping=adaptive moves its scale; use flat, per_layer or automatic.",
    )
    yield (
        config.privacy.clipping == "flat" or math.isfinite(config.privacy.clip_norm),
        f"clipping={config.privacy.clipping} needs a finite `clip_norm`.",
    )
    yield (
        trust in ("local", "none") or not (adaptive or banded),
        f"clipping=adaptive and noise=banded rest on each client's own noise: with trust={trust} no client's carries it.",
    )
    yield (
        trust != "client" or config.privacy.clipping == "flat",
        f"clipping={config.privacy.clipping} is of examples: trust=client clips whole updates.",
    )
    yield (
        not (adaptive and banded),
        "clipping=adaptive and noise=banded exclude each other: correlated noise is of one scale.",
    )
    yield (
        0 < config.privacy.clip_quantile < 1,
        f"clip_quantile={config.privacy.clip_quantile} must lie between 0 and 1.",
    )
    yield 0 < config.privacy.clip_rate <= 5, f"clip_rate={config.privacy.clip_rate} must lie above 0, at most 5."
    count = config.privacy.count_noise_multiplier
    yield count is None or adaptive, "`count_noise_multiplier` belongs to clipping=adaptive."
    yield (
        count is None or 0.03 <= count <= MOST_NOISE,
        f"count_noise_multiplier={count} must be 0.03 to {MOST_NOISE:g}: less would spend any budget.",
    )
    yield config.privacy.bands is None or banded, "`bands` belongs to noise=banded."
    yield not banded or trust != "none", "noise=banded is noise, and trust=none has none."
    yield (
        not banded or (bands > 1 and steps % bands == 0),
        f"noise=banded needs `local_steps` and `bands` of 2 or more, bands dividing local_steps ({steps}).",
    )


def _processes(config):
    """(holds, what to say if not) for the flags that join several processes."""
    where, count, number = config.execution.coordinator, config.execution.processes, config.execution.process
    yield (
        where is not None or (count in (None, 1) and number in (None, 0)),
        "`processes` and `process` need coordinator=HOST:PORT, where process 0 listens.",
    )
    yield (
        config.execution.stall_timeout >= 10,
        f"stall_timeout={config.execution.stall_timeout:g} must be 10 seconds or more.",
    )
    if where in (None, "auto"):
        return
    host, _, port = where.rpartition(":")
    yield host and port.isdigit() and 0 < int(port) < 65536, f"coordinator={where} is not HOST:PORT, nor auto."
    yield (
        count is not None and number is not None,
        f"coordinator={where} needs processes=N and process=I, from 0 to N - 1; or give coordinator=auto.",
    )
    yield count >= 1, f"processes={count} must be 1 or more."
    yield 0 <= number < count, f"process={number} must lie between 0 and processes={count} less one."
