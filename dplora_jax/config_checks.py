"""What a configuration must be, each field alone and all together: what has no guarantee, or no meaning, is refused.

The checks import no JAX.
"""

import math
import numbers

from dplora_jax.config import FIELDS, RunConfig, field_value, fields, replace
from dplora_jax.config.federation import RECORD
from dplora_jax.data.partition import FOLDERS
from dplora_jax.errors import InputError
from dplora_jax.federation import aggregation_checks, held_out, methods, trust
from dplora_jax.privacy import accounting, clippers, noises
from dplora_jax.privacy.accounting import MOST_NOISE, MOST_STEPS

KINDS = {bool: bool, int: numbers.Integral, float: numbers.Real, str: str, tuple: tuple}
KINDS_IN_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a tuple"}
MOST_PLACES = 5 * 10**7  # of the schedule of who is in which round
MOST_EPSILON = 1000


def settle(config):
    """Check `config` (a FederationConfig or RunConfig as given) -> it with what follows for the fields that are not given.

    An epsilon of infinity is trust mode `none`. Raises InputError with the first sentence that holds against it.
    """
    if config.privacy.epsilon is not None and config.privacy.noise_multiplier is not None:
        raise InputError("`epsilon` and `noise_multiplier` exclude each other: set one of them to none.")
    if config.privacy.epsilon == math.inf:
        config = replace(config, trust=trust.none.MODE.name)
    _raise_first(_names(config))
    if not trust.mode(config).private:
        config = replace(config, epsilon=None, noise_multiplier=None, private_test_epsilon=None)
    refuse(config)
    return settled(config)


def settled(config):
    """A checked `config` with what follows for the fields that are not given."""
    config = _filled(config)
    return config if config.optimizer.head_lr is not None else replace(config, head_lr=config.optimizer.client_lr)


def _variants(config):
    """(field, every record by name, the record of `config`) of each field whose value is looked up in a registry."""
    yield "trust", trust.BY_NAME, trust.mode(config)
    yield "noise", noises.KINDS, noises.KINDS[config.privacy.noise]
    yield "clipping", clippers.KINDS, clippers.kind(config)


def _filled(config):
    """`config` with the defaults of its trust mode, of its noise and of what is kept back."""
    defaults = trust.mode(config).defaults(config) | noises.KINDS[config.privacy.noise].defaults(config)
    defaults |= held_out.defaults(config)
    return replace(config, **{name: value for name, value in defaults.items() if field_value(config, name) is None})


def refuse(config):
    """Raise InputError with the first sentence that holds against `config`, trust mode, epsilon and sigma being settled."""
    for checks in (_names, _ranges, _unit, _budget, _combinations, aggregation_checks.checks):
        _raise_first(checks(config))
    _raise_first(_processes(config.execution))
    if isinstance(config, RunConfig):
        _raise_first(_records(config))
    mode = trust.mode(config)
    if mode.private:
        steps = config.schedule.rounds * mode.steps_per_round(config)
        accounting.check_delta(config.privacy.delta, -(-steps // (_filled(config).privacy.bands or 1)))


def _raise_first(checks):
    for holds, sentence in checks:
        if not holds:
            raise InputError(sentence)


def _names(config):
    """(holds, what to say if not) for each field that names a variant."""
    registries = {
        "trust": trust.BY_NAME, "noise": noises.KINDS, "clipping": clippers.KINDS, "aggregation": methods.BY_NAME
    }  # fmt: skip
    for field, registry in registries.items():
        value = field_value(config, field)
        yield value in tuple(registry), f"{field}={value} is not known: {_listed(registry)}."


def _listed(names):
    *others, last = map(str, names)
    return f"{', '.join(others)} or {last}"


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
            yield value in known["choices"], f"{name}={value} is not known: {_listed(known['choices'])}."
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


def _unit(config):
    """(holds, what to say if not) for what is protected."""
    unit, _, column = config.privacy.privacy_unit.partition(":")
    yield (
        config.privacy.privacy_unit == RECORD or (unit == "column" and column),
        f"privacy_unit={config.privacy.privacy_unit} is malformed; write record or column:NAME.",
    )


def _budget(config):
    """(holds, what to say if not) for what is promised and what it costs."""
    privacy, schedule, private = config.privacy, config.schedule, trust.mode(config).private
    sigma, (low, high) = privacy.noise_multiplier, accounting.CLIP_NORMS
    yield (
        not private or privacy.epsilon is not None or sigma is not None,
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
        not private or noises.KINDS[privacy.noise].gaussian,
        f"noise={privacy.noise} is not the Gaussian noise that is accounted: its epsilon is unknown. Use another, or trust=none.",
    )
    yield (
        not private or math.isfinite(privacy.clip_norm),
        "clip_norm=inf clips nothing: only trust=none allows it.",
    )
    yield (
        not private or low <= privacy.clip_norm <= high,
        f"clip_norm={privacy.clip_norm} must lie in {low:g} to {high:g}: float32 cannot square smaller gradients.",
    )
    yield (
        schedule.rounds * schedule.local_steps <= MOST_STEPS and schedule.rounds * schedule.clients <= MOST_PLACES,
        (
            f"rounds={schedule.rounds} is too many: rounds times `local_steps` must be at most {MOST_STEPS}, and rounds "
            f"times `clients` at most {MOST_PLACES}."
        ),
    )
    yield (
        config.lora.trained_targets or config.lora.head_only,
        "`targets` is empty: name matrices, or give `head_only` to train the head alone.",
    )
    yield (
        not config.lora.core or not (config.lora.head_only or config.lora.freeze_a),
        "`core` trains neither A nor B: leave out `freeze_a` and `head_only`.",
    )


def _combinations(config):
    """(holds, what to say if not) for trust mode, noise and clipping with their own fields, and with each other."""
    for field, registry, chosen in _variants(config):
        for name, record in registry.items():
            for own in record.fields:
                yield (
                    own in chosen.fields or field_value(config, own) is None,
                    f"`{own}` belongs to {field}={name}: leave it out with {field}={field_value(config, field)}.",
                )
    config = _filled(config)
    mode = trust.mode(config)
    yield from mode.checks(config)
    yield from noises.KINDS[config.privacy.noise].checks(config, mode)
    yield from clippers.checks(config, mode)
    yield from held_out.checks(config, mode)


def _records(config):
    """(holds, what to say if not) for the fields of a run that a federation alone has not."""
    data, clients = config.data, config.schedule.clients
    yield (
        data.party == 0 or (clients == 1 and 0 < data.party < (data.parties or 1)),
        f"party={data.party} must be one of `parties`, with clients=1.",
    )
    yield (
        data.parties is None or (data.parties >= clients and data.partition != FOLDERS),
        f"parties={data.parties} must be at least clients={clients}, and cannot be used with partition=folders.",
    )
    names = [entry.partition(":") for entry in config.public.labels]
    yield (
        all(old and new for old, _, new in names) and len({old for old, _, _ in names}) == len(names),
        f"public_labels={','.join(config.public.labels)} is malformed: write OLD:NEW for each label whose name differs.",
    )
    yield (
        not names or config.public.data,
        "`public_labels` names labels of `public_data`: give that too, or leave it out.",
    )
    yield (
        not config.base.quantize or config.base.dtype != "mixed",
        "`quantize` multiplies in `dtype`, where dtype=mixed has two: use dtype=bfloat16 or float32.",
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
    yield host and port.isdigit() and 0 < int(port) < 65536, f"coordinator={where} must be HOST:PORT or auto."
    yield (
        count is not None and number is not None,
        f"coordinator={where} needs processes=N and process=I, from 0 to N - 1; or give coordinator=auto.",
    )
    yield count >= 1, f"processes={count} must be 1 or more."
    yield 0 <= number < count, f"process={number} must lie between 0 and {count - 1}, with processes={count}."
