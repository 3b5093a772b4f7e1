"""config.json and metrics.jsonl of a working directory: written here, and read here as files that anyone may have edited, each
value of its type or refused; no JAX."""

import hashlib
import io
from typing import NamedTuple

from dplora_jax import config_checks
from dplora_jax.config import FIELDS, RunConfig, field_value, from_flat, to_flat
from dplora_jax.errors import InputError
from dplora_jax.federation import calibration, trust
from dplora_jax.files import plain, to_json
from dplora_jax.json_files import (
    Unfit,
    anything,
    flag,
    list_of,
    load,
    optional,
    parse,
    read,
    real,
    record,
    scalar,
    text,
    whole,
)  # fmt: skip
from dplora_jax.privacy import accounting, ledger
from dplora_jax.privacy.chain import replace_durably

NO_PRIVACY = "NO PRIVACY"
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
COUNT, TEXT = whole(0, 2**63), text(1 << 16)
ROW = record(
    {name: check for name, check in ledger.MECHANISM.items() if name != "kind"} | {"epsilon": real(0)},
    ledger.LATER
    | {"sampled_from": ledger.MECHANISM["records"], "client": COUNT, "rounds": COUNT, "weight": optional(real())}
    | {"bytes_up": real(0), "bytes_down": real(0)},
    anything,
)
DATA = {
    "description": TEXT, "synthetic": flag, "train_records": COUNT, "test_records": COUNT, "labels": list_of(scalar),
    "commonest_label": optional(real(0, 1)),
}  # fmt: skip
SENT = {
    "adapter_parameters": COUNT, "full_parameters": COUNT, "bytes_up_per_client_per_round": real(0), "ratio": real(0),
    "bytes_down_per_client_per_round": real(0), "full_bytes_per_client_per_round": real(0),
}  # fmt: skip
TEST = {
    "units": list_of(whole(1, 10**12), 10**6, 1), "evaluations": whole(1, accounting.MOST_STEPS + 1),
    "noise_multiplier": ledger.MECHANISM["noise_multiplier"], "epsilon": real(0),
}  # fmt: skip
# What a run says beyond its fields; what an earlier version did not write reads as None or as nothing.
DESCRIPTION = {
    "data": record({}, DATA, anything), "communication": record({}, SENT, anything), "trust": list_of(TEXT),
    "method": list_of(TEXT), "accounting": TEXT, "command": text(1 << 20), "environment": record({}, {}, scalar),
    "base_files": record({}, {}, TEXT), "apart": flag, "member": optional(COUNT),
    "private_test": optional(record(TEST)),
}  # fmt: skip
EMPTY = {
    "data": dict.fromkeys(DATA) | {"labels": []}, "communication": dict.fromkeys(SENT), "trust": [], "method": [],
    "accounting": "", "command": "", "environment": {}, "base_files": {}, "apart": False,
    "member": None, "private_test": None,
}  # fmt: skip
FEDERATION = record({"clients": list_of(ROW, 10**6, 1), "release": optional(text())}, DESCRIPTION, anything)
LINE = record(
    {"round": whole(0, accounting.MOST_STEPS), "epsilon": list_of(real(0), 10**6, 1), "epsilon_max": real(0)},
    {
        "release": optional(text()),
        "seconds": real(0),
        "finished": COUNT,
        "dropped": list_of(COUNT),
        "private_test_epsilon": real(0),
    },
    anything,
)


class Stored(NamedTuple):
    """What config.json says: the run's fields, each client's records, mechanism and planned epsilon, the mark of release, and
    what else the run says of itself (`description`, every name of EMPTY in it)."""

    config: RunConfig
    records: list
    mechanisms: list
    epsilons: list
    release: str
    digest: str  # SHA-256 (hex) of the document, however it is laid out: the ledger's begin entries have it
    description: dict
    document: dict  # the whole JSON object

    @property
    def member(self):
        """Which client this workdir's ledger is of, where parties share no machine; else None."""
        return self.description["member"]

    def own(self, values):
        """Of a list of one value a client, those whose ledger this workdir has."""
        return list(values) if self.member is None else [values[self.member]]

    @property
    def private(self):
        """Whether the run has any guarantee."""
        return trust.mode(self.config).private and self.release != NO_PRIVACY


class Line(NamedTuple):
    """A line of metrics.jsonl: its round, each client's epsilon, the largest, the mark of release, and all `values` by name."""

    number: int
    epsilon: list  # a float a client
    largest: float
    release: str | None
    values: dict


def _flag_check(entry):
    """The check of a Field's value in config.json, where numbers are numbers and infinity is "inf"."""
    if entry.flag in ("epsilon", "noise_multiplier"):
        return optional(real(0))
    check = KINDS[str if entry.items else entry.kind]
    return optional(check) if entry.optional or entry.items else check


FLAGS = {flag: _flag_check(entry) for flag, entry in FIELDS.items()}
CONFIG = record({name: FLAGS[name] for name in NEEDED} | {"federation": FEDERATION}, FLAGS, anything)


def read_config(folder):
    """config.json -> Stored. The fields are such as a run takes: a later version's are not known, an earlier one's are at their
    defaults. Raises InputError where the file is missing or damaged."""
    path = folder / "config.json"
    try:
        document = load(path, CONFIG)
        config = from_flat({name: document[name] for name in FLAGS if name in document})
        _refuse(config)
        federation = document["federation"]
        rows = federation["clients"]
        if len(rows) != config.schedule.clients:
            raise Unfit(f"it has rows for {len(rows)} clients, and clients={config.schedule.clients}")
        if not -1 < (federation.get("member") or 0) < len(rows):
            raise Unfit("it is of a client that it has no row for")
        return Stored(
            config=config_checks.settled(config),
            records=[row["records"] for row in rows],
            mechanisms=calibration.written(document),
            epsilons=[row["epsilon"] for row in rows],
            release=federation["release"] or NO_PRIVACY,
            digest=hashlib.sha256(to_json(document, sort_keys=True).encode()).hexdigest(),
            description={name: _filled(federation.get(name), empty) for name, empty in EMPTY.items()}
            | {"clients": rows},
            document=plain(document),
        )
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the workdir of a run that has started.") from None
    except Unfit as error:
        raise InputError(f"{path} is damaged: {error}; restore it, or start a new `workdir`.") from None


def _filled(value, empty):
    return empty if value is None else empty | value if isinstance(empty, dict) else value


def _refuse(config):
    """Unfit where no run has these fields."""
    budget, sigma = config.privacy.epsilon, config.privacy.noise_multiplier
    if config.privacy.trust not in trust.BY_NAME:
        raise Unfit(f"trust={config.privacy.trust} is not known")
    if (budget is None) + (sigma is None) != (1 if trust.mode(config).private else 2):
        raise Unfit(f"its `epsilon` and `noise_multiplier` do not fit trust={config.privacy.trust}")
    missing = [name for name in trust.mode(config).fields if field_value(config, name) is None]
    if missing:  # which a run resolves: its trust was edited
        raise Unfit(f"trust={config.privacy.trust} has no {missing[0]}")
    try:
        config_checks.refuse(config)
    except InputError as error:
        raise Unfit(f"no run can have its fields ({str(error).rstrip('.')})") from None


def read_metrics(folder, rounds=accounting.MOST_STEPS):
    """The Lines of metrics.jsonl, of at most so many `rounds`; none where there is no such file yet. Raises InputError."""
    path, lines = folder / "metrics.jsonl", []
    try:
        for text_line in io.BytesIO(read(path)):
            value = parse(text_line, LINE)
            lines.append(Line(value["round"], value["epsilon"], value["epsilon_max"], value.get("release"), value))
            if len(lines) > rounds + 1:
                raise Unfit("it has more lines than rounds")
    except FileNotFoundError:
        pass
    except Unfit as error:
        raise InputError(
            f"{path} is damaged: {error}; run the same command again to rebuild it, or restore it."
        ) from None
    return lines


def with_defaults(document):
    """`document`, what a config.json says, with the fields that a later version added: they were at their defaults."""
    return plain(to_flat(RunConfig())) | document


def write_config(folder, config, federation):
    """Write `config.json`: every flag as resolved, and what the run made of them under "federation"."""
    document = to_flat(config) | {"federation": federation}
    replace_durably(folder / "config.json", to_json(document, indent=2) + "\n")


def write_metrics(folder, lines):
    """Write `metrics.jsonl` anew: a line (a dict) a round."""
    replace_durably(folder / "metrics.jsonl", "".join(to_json(line) + "\n" for line in lines))
