"""config.json and metrics.jsonl, read as files that anyone may have edited: each fact is of its type, or refused; no JAX."""

import dataclasses
import io
from typing import NamedTuple

from dplora_jax import config_checks
from dplora_jax.config import RunConfig
from dplora_jax.errors import InputError
from dplora_jax.federation import calibration, workdir
from dplora_jax.json_files import Unfit, anything, flag, list_of, load, optional, parse, read, real, record, text, whole
from dplora_jax.privacy import accounting, ledger

KINDS = {bool: flag, int: whole(-(2**63), 2**63), float: real(), str: text(1 << 16)}
NEEDED = (
    "trust",
    "delta",
    "seed",
    "clients",
    "rounds",
    "local_steps",
    "expected_batch_size",
    "epsilon",
    "noise_multiplier",
)
ROW = record(
    {name: check for name, check in ledger.MECHANISM.items() if name != "kind"} | {"epsilon": real(0)},
    ledger.LATER | {"sampled_from": ledger.MECHANISM["records"]},
    anything,
)
FEDERATION = record({"clients": list_of(ROW, 10**6, 1), "release": optional(text())}, rest=anything)
LINE = record(
    {"round": whole(0, accounting.MOST_STEPS), "epsilon": list_of(real(0), 10**6, 1), "epsilon_max": real(0)},
    {"release": optional(text())},
    anything,
)


class Told(NamedTuple):
    """What config.json says of a run's privacy."""

    flags: RunConfig
    records: list  # each client's own
    mechanisms: list
    epsilons: list  # as planned
    release: str
    digest: str


class Line(NamedTuple):
    """What a line of metrics.jsonl says of privacy."""

    number: int
    epsilon: list  # a float a client
    largest: float
    release: str | None


def _of_flag(field):
    """The check of a flag's value in config.json, where numbers are numbers and infinity is "inf"."""
    if field.name in ("epsilon", "noise_multiplier"):
        return optional(real(0))
    return next(KINDS[t] if field.type is t else optional(KINDS[t]) for t in KINDS if field.type in (t, t | None))


FLAGS = {field.name: _of_flag(field) for field in dataclasses.fields(RunConfig)}
CONFIG = record({name: FLAGS[name] for name in NEEDED} | {"federation": FEDERATION}, FLAGS, anything)


def read_config(folder):
    """What config.json tells -> Told. The flags are such as a run takes: a later version's are not known, an earlier one's are at
    their defaults."""
    path = folder / "config.json"
    try:
        document = load(path, CONFIG)
        config = RunConfig(**{name: document[name] for name in FLAGS if name in document})
        _refuse(config)
        rows = document["federation"]["clients"]
        if len(rows) != config.schedule.clients:
            raise Unfit(f"it tells of {len(rows)} clients, and has clients={config.schedule.clients}")
        release = document["federation"]["release"] or "NO PRIVACY"
        values = [row["records"] for row in rows], calibration.written(document), [row["epsilon"] for row in rows]
        return Told(config_checks.settled(config, config.privacy.trust), *values, release, workdir.digest_of(document))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the workdir of a run that has started.") from None
    except Unfit as error:
        raise InputError(f"{path} is damaged: {error}; restore it.") from None


def _refuse(config):
    """Unfit where no run has these flags."""
    budget, sigma = config.privacy.epsilon, config.privacy.noise_multiplier
    if config.privacy.trust not in ("local", "distributed", "client", "none"):
        raise Unfit("trust is none that is known")
    if (budget is None) + (sigma is None) != (1 if config.privacy.private else 2):
        raise Unfit(f"it has no `epsilon` and `noise_multiplier` of trust={config.privacy.trust}")
    try:
        config_checks.refuse(config, config.privacy.trust, budget, sigma)
    except InputError as error:
        raise Unfit(f"no run has its flags ({str(error).rstrip('.')})") from None


def read_metrics(folder, rounds):
    """The Lines of metrics.jsonl, of at most so many `rounds`; none where there is no such file yet."""
    path, lines = folder / "metrics.jsonl", []
    try:
        for text_line in io.BytesIO(read(path)):
            value = parse(text_line, LINE)
            lines.append(Line(value["round"], value["epsilon"], value["epsilon_max"], value.get("release")))
            if len(lines) > rounds + 1:
                raise Unfit("it has more lines than rounds")
    except FileNotFoundError:
        pass
    except Unfit as error:
        raise InputError(
            f"{path} is damaged: {error}; run the same command again to rebuild it, or restore it."
        ) from None
    return lines
