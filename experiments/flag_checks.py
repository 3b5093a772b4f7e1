"""What a run's flags must be, each alone and together: a combination that has no guarantee, or no meaning, is refused.

`config` is a `flags.RunConfig` as given.
"""

import dataclasses
import math

from dplora_jax.errors import InputError
from dplora_jax.privacy import accounting
from dplora_jax.privacy.accounting import MOST_NOISE, MOST_STEPS
from experiments import aggregation_checks

# The flags of one trust mode alone, and what they are when not given.
DISTRIBUTED = {"survivors": lambda config: config.clients, "colluding": lambda _: 1}
MOST_PLACES = 5 * 10**7  # of the schedule of who is in which round
CLIENT = {"client_rate": lambda _: 1.0}


def parties(config, trust):
    """The trust mode's own flags, settled."""
    own = {"distributed": DISTRIBUTED, "client": CLIENT}.get(trust, {})
    given = {name: getattr(config, name) for name in own}
    settled = {name: default(config) if given[name] is None else given[name] for name, default in own.items()}
    return settled | ({"dropout": config.dropout or 0.0} if trust == "distributed" else {})


def settled(config, trust):
    """`config` with what follows from its flags for those that are not given."""
    head_lr = config.client_lr if config.head_lr is None else config.head_lr
    bands = (config.bands or config.local_steps) if config.noise == "banded" else None
    return dataclasses.replace(config, **parties(config, trust), bands=bands, head_lr=head_lr)


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
        bands = (config.bands or config.local_steps) if config.noise == "banded" else 1
        steps = config.rounds * (1 if trust == "client" else config.local_steps)
        accounting.check_delta(config.delta, -(-steps // bands))


def _combinations(config, trust):
    """(holds, what to say if not) for the combinations of a trust mode's flags that have no guarantee, or no meaning."""
    for mode, own in (("distributed", DISTRIBUTED), ("client", CLIENT)):
        for name in own:
            given = getattr(config, name)
            yield (
                trust == mode or given is None,
                f"--{name} belongs to --trust={mode}: leave it out with --trust={trust}.",
            )
    settled = parties(config, trust)
    if trust == "distributed":
        survivors, colluding = settled["survivors"], settled["colluding"]
        yield (
            config.local_steps == 1,
            f"--local_steps={config.local_steps} with --trust=distributed: only a total carries enough noise to be looked at, so "
            "a round is one step; use --local_steps=1 and more --rounds.",
        )
        yield (
            config.client_optimizer == "sgd",
            f"--client_optimizer={config.client_optimizer} with --trust=distributed: no client sees its gradient's noise, so the "
            "server holds all optimizer state; use sgd and --server_momentum.",
        )
        yield (
            1 <= survivors <= config.clients,
            f"--survivors={survivors} must lie between 1 and --clients={config.clients}.",
        )
        yield (
            colluding >= 1,
            f"--colluding={colluding} must be 1 or more: every client knows its own noise and may be the curious one.",
        )
        yield (
            survivors - colluding >= 1,
            f"--trust=distributed with {survivors} surviving clients of which {colluding} collude leaves no honest noise: raise "
            "--clients or --survivors, or lower --colluding.",
        )
    if trust == "client":
        rate = settled["client_rate"]
        yield 0 < rate <= 1, f"--client_rate={rate} must lie above 0, at most 1."
        yield (
            config.delta * config.clients < 1,
            f"--delta={config.delta:g} with --trust=client must be below 1 / --clients={config.clients}: at that delta, "
            "publishing one client's records whole would count as private.",
        )


def _ranges(config, trust, budget, sigma):
    """(holds, what to say if not) for each flag with a range."""
    private = trust != "none"
    yield (
        budget is None or 0 < budget <= 1000,
        f"--epsilon={budget} must lie above 0, at most 1000 (inf for no privacy).",
    )
    yield (
        sigma is None or 0.05 <= sigma <= MOST_NOISE,
        f"--noise_multiplier={sigma} must be 0.05 to {MOST_NOISE:g}; --trust=none runs without noise.",
    )
    yield 0 < config.delta < 1, f"--delta={config.delta} must lie between 0 and 1."
    yield config.clip_norm > 0, f"--clip_norm={config.clip_norm} must be above 0."
    low, high = accounting.CLIP_NORMS
    yield (
        not private or config.clip_norm == math.inf or low <= config.clip_norm <= high,
        f"--clip_norm={config.clip_norm} must lie in {low:g} to {high:g}: float32 cannot square smaller gradients.",
    )
    yield not private or math.isfinite(config.clip_norm), "--clip_norm=inf clips nothing: only --trust=none allows it."
    for name in ("rounds", "local_steps", "clients", "rank", "dispatch_rounds", "wave", "max_length"):
        value = getattr(config, name)
        yield value is None or value >= 1, f"--{name}={value} must be 1 or more."
    yield (
        config.rounds * config.local_steps <= MOST_STEPS and config.rounds * config.clients <= MOST_PLACES,
        f"--rounds={config.rounds} must be at most {MOST_STEPS} over --local_steps, and {MOST_PLACES} over --clients.",
    )
    for name in ("microbatch", "last_layers", "train_records", "test_records", "benchmark_records", "new_tokens"):
        yield (
            getattr(config, name) is None or getattr(config, name) >= 1,
            f"--{name}={getattr(config, name)} must be 1 or more.",
        )
    for name in ("client_lr", "server_lr", "expected_batch_size", "alpha"):
        yield 0 < getattr(config, name) < math.inf, f"--{name}={getattr(config, name)} must be a number above 0."
    yield (
        0 <= config.feature_norm < math.inf,
        f"--feature_norm={config.feature_norm} must be a number above 0, or 0 for features as they are.",
    )
    yield (
        not config.feature_norm or math.isfinite(config.clip_norm),
        "--feature_norm makes gradients as long as it says, too long for --clip_norm=inf: clip them, or leave it out.",
    )
    yield config.head_lr is None or 0 <= config.head_lr < math.inf, f"--head_lr={config.head_lr} must be 0 or more."
    for name in ("ema", "server_momentum"):
        yield 0 <= getattr(config, name) < 1, f"--{name}={getattr(config, name)} must lie in [0, 1)."
    yield 0 <= config.lr_decay <= 1, f"--lr_decay={config.lr_decay} must lie in [0, 1]."
    for name in ("eval_every", "generate"):
        yield getattr(config, name) >= 0, f"--{name}={getattr(config, name)} must be 0 or more."
    yield (
        config.party == 0 or (config.clients == 1 and 0 < config.party < (config.parties or 1)),
        f"--party={config.party} is one of --parties, with --clients=1.",
    )
    objectives = ("auto", "classifier", "language_model")
    yield config.objective in objectives, f"--objective={config.objective} is not known: {', '.join(objectives)}."
    yield (
        config.parties is None or (config.parties >= config.clients and config.partition != "folders"),
        f"--parties={config.parties} must be at least --clients={config.clients}, of a table that is dealt.",
    )
    yield (
        config.client_optimizer in ("sgd", "adam"),
        f"--client_optimizer={config.client_optimizer} is not known: sgd or adam.",
    )
    yield config.head_only or config.target_list, "--targets is empty: --head_only trains a head alone."


def _variants(config, trust):
    """(holds, what to say if not) for the flags of clipping and noise."""
    adaptive, banded, steps = config.clipping == "adaptive", config.noise == "banded", config.local_steps
    hardened = config.noise == "hardened"
    bands = steps if config.bands is None else config.bands
    known = ("flat", "per_layer", "automatic", "adaptive")
    yield config.clipping in known, f"--clipping={config.clipping} is not known: {', '.join(known)}."
    noises = ("independent", "banded", "hardened")
    yield config.noise in noises, f"--noise={config.noise} is not known: {', '.join(noises)}."
    yield (
        not hardened or trust == "local",
        f"--noise=hardened is of --trust=local: rounded shares are no rounded total; leave it out of --trust={trust}.",
    )
    yield (
        not (hardened and adaptive),
        "--noise=hardened needs a grid that stays: --clipping=adaptive moves its scale; use flat, per_layer or automatic.",
    )
    yield (
        config.clipping == "flat" or math.isfinite(config.clip_norm),
        f"--clipping={config.clipping} needs a finite --clip_norm.",
    )
    yield (
        trust in ("local", "none") or not (adaptive or banded),
        f"--clipping=adaptive and --noise=banded rest on each client's own noise: with --trust={trust} no client's carries it.",
    )
    yield (
        trust != "client" or config.clipping == "flat",
        f"--clipping={config.clipping} is of examples: --trust=client clips whole updates.",
    )
    yield (
        not (adaptive and banded),
        "--clipping=adaptive and --noise=banded exclude each other: correlated noise is of one scale.",
    )
    yield 0 < config.clip_quantile < 1, f"--clip_quantile={config.clip_quantile} must lie between 0 and 1."
    yield 0 < config.clip_rate <= 5, f"--clip_rate={config.clip_rate} must lie above 0, at most 5."
    count = config.count_noise_multiplier
    yield count is None or adaptive, "--count_noise_multiplier belongs to --clipping=adaptive."
    yield (
        count is None or 0.03 <= count <= MOST_NOISE,
        f"--count_noise_multiplier={count} must be 0.03 to {MOST_NOISE:g}: less would spend any budget.",
    )
    yield config.bands is None or banded, "--bands belongs to --noise=banded."
    yield not banded or trust != "none", "--noise=banded is noise, and --trust=none has none."
    yield (
        not banded or (bands > 1 and steps % bands == 0),
        f"--noise=banded needs --local_steps and --bands of 2 or more, bands dividing local_steps ({steps}).",
    )


def _processes(config):
    """(holds, what to say if not) for the flags that join several processes."""
    where, count, number = config.coordinator, config.processes, config.process
    yield (
        where is not None or (count in (None, 1) and number in (None, 0)),
        "--processes and --process need --coordinator=HOST:PORT, where process 0 listens.",
    )
    yield config.stall_timeout >= 10, f"--stall_timeout={config.stall_timeout:g} must be 10 seconds or more."
    if where in (None, "auto"):
        return
    host, _, port = where.rpartition(":")
    yield host and port.isdigit() and 0 < int(port) < 65536, f"--coordinator={where} is not HOST:PORT, nor auto."
    yield (
        count is not None and number is not None,
        f"--coordinator={where} needs --processes=N and --process=I, from 0 to N - 1; or give --coordinator=auto.",
    )
    yield count >= 1, f"--processes={count} must be 1 or more."
    yield 0 <= number < count, f"--process={number} must lie between 0 and --processes={count} less one."
