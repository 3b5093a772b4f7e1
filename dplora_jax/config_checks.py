"""What a configuration must be, each field alone and all together: what has no guarantee, or no meaning, is refused.

The checks import no JAX.
"""

import math
import numbers

from dplora_jax.config import FIELDS, RunConfig, field_value, fields, replace
from dplora_jax.errors import InputError
from dplora_jax.federation import aggregation_checks
from dplora_jax.privacy import accounting, noises
from dplora_jax.privacy.accounting import MOST_NOISE, MOST_STEPS

# The fields of one trust mode alone, and what they are when not given.
TRUST_FIELDS = {
    "distributed": {"survivors": lambda config: config.schedule.clients, "colluding": lambda _: 1},
    "client": {"client_rate": lambda _: 1.0},
}
KINDS = {bool: bool, int: numbers.Integral, float: numbers.Real, str: str, tuple: tuple}
KINDS_IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a tuple"}
MOST_PLACES = 5 * 10**7  # of the schedule of who is in which round
MOST_EPSILON = 1000


def settle(config):
    """Check `config` (a FederationConfig or RunConfig as given) -> it with what follows for the fields that are not given.

    An epsilon of infinity is trust mode `none`. Raises InputError with the first sentence that holds against it.
    """
    if config.privacy.epsilon is not None and config.privacy.noise_multiplier is not None:
        raise InputError("`epsilon` and `noise_multiplier` exclude each other; epsilon=none unsets a flagfile's.")
    if config.privacy.epsilon == math.inf:
        config = replace(config, trust="none")
    if config.privacy.trust == "none":
        config = replace(config, epsilon=None, noise_multiplier=None)
    refuse(config)
    return settled(config)


def settled(config):
    """A checked `config` with what follows for the fields that are not given."""
    values = trust_fields(config)
    if config.privacy.trust == "distributed":
        values["dropout"] = config.schedule.dropout or 0.0
    if config.optimizer.head_lr is None:
        values["head_lr"] = config.optimizer.client_lr
    banded = config.privacy.noise == "banded"
    values["bands"] = (config.privacy.bands or config.schedule.local_steps) if banded else None
    return replace(config, **values)


def trust_fields(config):
    """{field: value} of the fields that the trust mode alone has, as given or by default."""
    defaults = TRUST_FIELDS.get(config.privacy.trust, {})
    given = {name: field_value(config, name) for name in defaults}
    return {name: default(config) if given[name] is None else given[name] for name, default in defaults.items()}


def refuse(config):
    """Raise InputError with the first sentence that holds against `config`, trust mode, epsilon and sigma being settled."""
    several = [
        _ranges(config),
        _budget(config),
        _combinations(config),
        _variants(config),
        aggregation_checks.checks(config),
        _processes(config.execution),
    ]
    if isinstance(config, RunConfig):
        several.append(_records(config))
    for checks in several:
        for holds, sentence in checks:
            if not holds:
                raise InputError(sentence)
    if config.privacy.private:
        bands = (config.privacy.bands or config.schedule.local_steps) if config.privacy.noise == "banded" else 1
        accounting.check_delta(config.privacy.delta, -(-config.schedule.rounds * config.steps_per_round // bands))


def _ranges(config):
    """(holds, what to say if not) for each field with a range or choices of its own."""
    for name in fields(config):
        value, known = field_value(config, name), FIELDS[name].metadata
        if value is None and FIELDS[name].optional:
            continue
        kind = FIELDS[name].kind
        yield (
            isinstance(value, KINDS[kind]) and (kind is bool or not isinstance(value, bool)),
            (f"{name}={value!r} must be {KINDS_IN_WORDS[kind]}."),
        )
        if "choices" in known:
            *others, last = map(str, known["choices"])
            yield value in known["choices"], f"{name}={value} is not known: {', '.join(others)} or {last}."
            continue
        least, most = known.get("least", -math.inf), known.get("most", math.inf)
        above, below = known.get("above"), known.get("below")
        if any(bound in known for bound in ("least", "most", "above", "below")):
            holds = least <= value <= most and (above is None or above < value) and (below is None or value < below)
            yield holds, f"{name}={value} must {_range_in_words(known)}."


def _range_in_words(known):
    """The range of a field in words, as in "lie above 0, at most 5"."""
    least, most, above, below = (known.get(name) for name in ("least", "most", "above", "below"))
    finite = below == math.inf
    if finite:
        below = None
    if below is not None:
        return f"lie between {above:g} and {below:g}" if above is not None else f"lie in [{least:g}, {below:g})"
    if most is not None:
        return f"lie above {above:g}, at most {most:g}" if above is not None else f"lie in [{least:g}, {most:g}]"
    low = f"above {above:g}" if above is not None else f"{least:g} or more"
    return f"be a finite number, {low}" if finite else f"be {low}"


def _budget(config):
    """(holds, what to say if not) for what is promised and what it costs."""
    privacy, schedule = config.privacy, config.schedule
    sigma, (low, high) = privacy.noise_multiplier, accounting.CLIP_NORMS
    yield (
        not privacy.private or privacy.epsilon is not None or sigma is not None,
        f"trust={privacy.trust} needs `epsilon` or `noise_multiplier`; trust=none runs without privacy.",
    )
    yield (
        privacy.epsilon is None or privacy.epsilon <= MOST_EPSILON,
        f"epsilon={privacy.epsilon} must lie above 0, at most {MOST_EPSILON} (inf for no privacy).",
    )
    yield (
        sigma is None or 0.05 <= sigma <= MOST_NOISE,
        f"noise_multiplier={sigma} must be 0.05 to {MOST_NOISE:g}; trust=none runs without noise.",
    )
    yield (
        not privacy.private or math.isfinite(privacy.clip_norm),
        "clip_norm=inf clips nothing: only trust=none allows it.",
    )
    yield (
        not privacy.private or low <= privacy.clip_norm <= high,
        f"clip_norm={privacy.clip_norm} must lie in {low:g} to {high:g}: float32 cannot square smaller gradients.",
    )
    yield (
        schedule.rounds * schedule.local_steps <= MOST_STEPS and schedule.rounds * schedule.clients <= MOST_PLACES,
        f"rounds={schedule.rounds} must be at most {MOST_STEPS} over `local_steps`, and {MOST_PLACES} over `clients`.",
    )
    yield config.lora.trained_targets or config.lora.head_only, "`targets` is empty: `head_only` trains a head alone."


def _combinations(config):
    """(holds, what to say if not) for the combinations of a trust mode's fields that have no guarantee, or no meaning."""
    trust, clients = config.privacy.trust, config.schedule.clients
    for mode, names in TRUST_FIELDS.items():
        for name in names:
            yield (
                trust == mode or field_value(config, name) is None,
                f"`{name}` belongs to trust={mode}: leave it out with trust={trust}.",
            )
    given = trust_fields(config)
    if trust == "distributed":
        survivors, colluding = given["survivors"], given["colluding"]
        yield (
            config.schedule.local_steps == 1,
            f"local_steps={config.schedule.local_steps} with trust=distributed: only a total carries enough noise to be looked "
            "at, so a round is one step; use local_steps=1 and more `rounds`.",
        )
        yield (
            config.optimizer.client_optimizer == "sgd",
            f"client_optimizer={config.optimizer.client_optimizer} with trust=distributed: no client sees its gradient's noise, "
            "so the server holds all optimizer state; use sgd and `server_momentum`.",
        )
        yield 1 <= survivors <= clients, f"survivors={survivors} must lie between 1 and clients={clients}."
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
        rate = given["client_rate"]
        yield 0 < rate <= 1, f"client_rate={rate} must lie above 0, at most 1."
        yield (
            config.privacy.delta * clients < 1,
            f"delta={config.privacy.delta:g} with trust=client must be below 1 / clients={clients}: at that delta, "
            "publishing one client's records whole would count as private.",
        )


def _variants(config):
    """(holds, what to say if not) for the fields of clipping and noise."""
    privacy, steps = config.privacy, config.schedule.local_steps
    adaptive, banded, hardened = (
        privacy.clipping == "adaptive",
        privacy.noise == "banded",
        privacy.noise == "hardened",
    )
    bands = steps if privacy.bands is None else privacy.bands
    trust = privacy.trust
    yield privacy.noise in noises.KINDS, f"noise={privacy.noise} is not known: {', '.join(noises.KINDS)}."
    yield (
        not hardened or trust == "local",
        f"noise=hardened cannot be used with trust={trust}: rounded shares do not make a rounded total; use trust=local.",
    )
    yield (
        not (hardened and adaptive),
        "noise=hardened needs a grid that stays, and clipping=adaptive moves its scale; use flat, per_layer or automatic.",
    )
    yield (
        privacy.clipping == "flat" or math.isfinite(privacy.clip_norm),
        f"clipping={privacy.clipping} needs a finite `clip_norm`.",
    )
    yield (
        trust in ("local", "none") or not (adaptive or banded),
        f"clipping=adaptive and noise=banded rest on each client's own noise: with trust={trust} no client's carries it.",
    )
    yield (
        trust != "client" or privacy.clipping == "flat",
        f"clipping={privacy.clipping} clips examples, and trust=client clips whole updates: use clipping=flat.",
    )
    yield (
        not (adaptive and banded),
        "clipping=adaptive and noise=banded exclude each other: correlated noise is of one scale.",
    )
    count = privacy.count_noise_multiplier
    yield count is None or adaptive, "`count_noise_multiplier` belongs to clipping=adaptive."
    yield (
        count is None or 0.03 <= count <= MOST_NOISE,
        f"count_noise_multiplier={count} must be 0.03 to {MOST_NOISE:g}: less would spend any budget.",
    )
    yield privacy.bands is None or banded, "`bands` belongs to noise=banded."
    yield not banded or trust != "none", "noise=banded cannot be used with trust=none."
    yield (
        not banded or (bands > 1 and steps % bands == 0),
        f"noise=banded needs `local_steps` and `bands` of 2 or more, `bands` dividing local_steps={steps}.",
    )


def _records(config):
    """(holds, what to say if not) for the fields of a run that a federation alone has not."""
    data, clients = config.data, config.schedule.clients
    yield (
        not config.base.feature_norm or math.isfinite(config.privacy.clip_norm),
        "`feature_norm` makes gradients as long as it says, too long for clip_norm=inf: clip them, or leave it out.",
    )
    yield (
        data.party == 0 or (clients == 1 and 0 < data.party < (data.parties or 1)),
        f"party={data.party} must be one of `parties`, with clients=1.",
    )
    yield (
        data.parties is None or (data.parties >= clients and data.partition != "folders"),
        f"parties={data.parties} must be at least clients={clients}, of a table that is dealt.",
    )


def _processes(execution):
    """(holds, what to say if not) for the fields that join several processes."""
    where, count, number = execution.coordinator, execution.processes, execution.process
    yield (
        where is not None or (count in (None, 1) and number in (None, 0)),
        "`processes` and `process` need coordinator=HOST:PORT, where process 0 listens.",
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
