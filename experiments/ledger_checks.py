"""config.json and metrics.jsonl, read as files that anyone may have edited, and held against the ledger; no JAX."""

import dataclasses
import itertools
import json
import math
from typing import NamedTuple

import numpy as np

from dplora_jax import errors
from dplora_jax.errors import InputError
from dplora_jax.federation import participation
from dplora_jax.privacy import accounting
from dplora_jax.privacy.ledger import rebuild, steps_of

# By which a recomputed epsilon may exceed the one shown: another version of the accountant, another machine.
SLACK = 1e-3
DAMAGES = (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)  # of a file's JSON


class Line(NamedTuple):
    """What a line of metrics.jsonl says of privacy."""

    number: int
    epsilon: list  # a float a client
    largest: float
    release: str | None


def read_config(workdir):
    """config.json, with every field there that is held against the ledger."""
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        facts, budget, noise = config["federation"], config["epsilon"], config["noise_multiplier"]
        mechanisms(config), [(_real(row["epsilon"]), row["records"]) for row in facts["clients"]]
        sound = (
            config["trust"] in ("local", "distributed", "client", "none")
            and 0 < _real(config["delta"]) < 1
            and all(type(config[name]) is int and config[name] > 0 for name in ("clients", "rounds", "local_steps"))
            and (config["seed"] is None or type(config["seed"]) is int)
            and all(value is None or _real(value) > 0 for value in (budget, noise))
            and (facts["release"] is None or isinstance(facts["release"], str))
            and len(facts["clients"]) == config["clients"]
        )
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the workdir of a run that has started.") from None
    except DAMAGES as error:
        if lost := errors.storage(error):
            raise lost from None
        sound = False
    if not sound:
        raise InputError(f"{path} is damaged: restore it.")
    return config


def _real(value):
    """The number of a JSON value, where "inf" is infinity; ValueError for anything else."""
    if value == "inf":
        return math.inf
    if type(value) not in (int, float):
        raise ValueError(value)
    return float(value)


def mechanisms(config):
    """Each client's mechanism as config.json (a dict) has it: what an earlier version did not write is at its default."""
    names = [field.name for field in dataclasses.fields(accounting.Mechanism)]
    # The rows tell the clients' own records. The mechanism's are more where there are null ones; in mode `client`, the clients.
    own = (lambda row: config["clients"]) if config["trust"] == "client" else (lambda row: row["records"])
    return [
        accounting.Mechanism(
            **{name: row[name] for name in names if name in row} | {"records": row.get("sampled_from", own(row))}
        )
        for row in config["federation"]["clients"]
    ]


def _charged(ledger):
    """Each client's mechanism as the ledger has it: one and the same in all its entries, once `check_config` has passed."""
    return [rebuild(client) for client in ledger.begun[0]["clients"]]


def _steps(config):
    """Steps of the mechanism in a round: in mode `client` a whole update is one."""
    return 1 if config["trust"] == "client" else config["local_steps"]


def _scheduled_steps(config):
    """Steps of the mechanism [rounds, K] of each client in each round, by the public schedule."""
    spec, seed = config.get("participation", "all"), config.get("split_seed", 0)
    return participation.schedule(spec, config["clients"], config["rounds"], seed) * _steps(config)


def check_config(path, config, ledger):
    """Release, guarantee, mechanisms and steps of every begin entry are those of config.json, and the epsilon that it plans
    for each client is what these come to."""
    planned_for, steps, seed = mechanisms(config), _steps(config), config["seed"]
    in_rounds = _scheduled_steps(config)
    private, release = config["trust"] != "none", config["federation"]["release"] or "NO PRIVACY"
    follows = ("for release" if seed is None else "NOT FOR RELEASE") if private else "NO PRIVACY"
    if not release.startswith(follows):
        raise InputError(f"{path} does not hold: it says {release!r}, and by its trust and seed the run is {follows}.")
    for number, entry in enumerate(ledger.entries, 1):
        if entry["entry"] != "begin":
            continue
        own = {"release": release, "trust": config["trust"], "delta": config["delta"], "local_steps": steps}
        other = [name for name, value in own.items() if entry.get(name, value) != value]
        other += ["seed"] if "nonce" in entry and seed is not None else []
        other += ["rounds"] if entry["rounds"][1] - 1 > config["rounds"] else []
        between = in_rounds[entry["rounds"][0] - 1 : entry["rounds"][1] - 1].sum(0).tolist()
        other += ["clients in its rounds"] if steps_of(entry) != between else []
        other += ["sampling or noise"] if [rebuild(client) for client in entry["clients"]] != planned_for else []
        if other:
            raise InputError(f"{path} does not agree with the ledger: entry {number} has other {', '.join(other)}.")
    sigma = config["noise_multiplier"]
    budget = math.inf if config["epsilon"] is None else _real(config["epsilon"])
    for client, (row, mechanism) in enumerate(zip(config["federation"]["clients"], _charged(ledger), strict=True)):
        least = accounting.epsilon(mechanism, int(in_rounds[:, client].sum()), config["delta"]) * (1 - SLACK)
        planned = _real(row["epsilon"])
        never = not private and not in_rounds[:, client].any()  # and so not without privacy either
        if not least <= planned <= budget * (1 + SLACK) or math.isfinite(planned) != (private or never):
            raise InputError(
                f"{path} does not agree with the ledger: client {client}'s epsilon does not follow from it."
            )
        if sigma is not None and sigma != mechanism.noise_multiplier:
            raise InputError(f"{path} does not agree with the ledger: noise_multiplier is not client {client}'s.")


def read_metrics(workdir):
    """The Lines of metrics.jsonl; none where there is no such file yet."""
    path = workdir / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        lines = [
            Line(v["round"], [_real(e) for e in v["epsilon"]], _real(v["epsilon_max"]), v.get("release")) for v in lines
        ]
        sound = all(type(line.number) is int for line in lines)
    except DAMAGES as error:
        if lost := errors.storage(error):
            raise lost from None
        sound = False
    if not sound:
        raise InputError(f"{path} is damaged: run the same command again to rebuild it, or restore it.")
    return lines


def check_metrics(path, config, ledger, lines):
    """Every line of metrics.jsonl is one that the run can have written when it had been charged as the ledger says."""
    wrong = _wrong_metrics(config, ledger, lines)
    if wrong:
        raise InputError(f"{path} does not agree with the ledger: it {wrong}.")


def _wrong_metrics(config, ledger, lines):
    """What no honest run writes, in words, or None."""
    committed = {r for entry in ledger.begun if ledger.committed(entry) for r in range(*entry["rounds"])}
    if early := sorted({line.number for line in lines} - committed - {0}):
        return f"shows round {early[0]}, which was never committed"
    if [line.number for line in lines] != list(range(len(lines))):
        return "does not show each round from 0 on once, in order"
    private, release = config["trust"] != "none", config["federation"]["release"] or "NO PRIVACY"
    in_rounds = _scheduled_steps(config)
    for line in lines:
        # Without privacy, all that follows a client's first round is infinite.
        free = [not private and bool(own) for own in in_rounds[: line.number].sum(0)]
        if len(line.epsilon) != config["clients"] or free != [not math.isfinite(value) for value in line.epsilon]:
            return f"has no epsilon for each client in round {line.number}"
        if line.largest != max(line.epsilon):
            return f"has another epsilon_max in round {line.number} than its largest epsilon"
        if line.release not in (None, release):
            return f"says {line.release!r} of round {line.number}, and the ledger {release!r}"
    if wrong := _understated(config, ledger, lines):
        return wrong
    if ledger.ended:
        last = next(entry for entry in ledger.entries if entry["entry"] == "end").get("round")
        if not lines or lines[-1].number != last:
            return f"does not end with round {last}, the run's last"
        if private and not _reaches(lines[-1].epsilon, ledger.epsilons(config["delta"])):
            return "shows less epsilon than was charged"
    return None


def _understated(config, ledger, lines):
    """Which line shows less epsilon than its round had been charged when it was first committed, or less than a line before it,
    in words; else None. (A charge that came later, for a round lost and run again, is in the last line alone.)"""
    in_rounds = _scheduled_steps(config)
    charged, total = {0: np.zeros(config["clients"], int)}, np.zeros(config["clients"], int)
    for entry in ledger.begun:
        first, end = entry["rounds"]
        if ledger.committed(entry):
            for number in range(first, end):
                charged.setdefault(number, total + in_rounds[first - 1 : number].sum(0))
        total = total + in_rounds[first - 1 : end - 1].sum(0)
    counts = np.array([charged[line.number] for line in lines]).T.tolist()
    # Lines within a dispatch may show more: they are reckoned on a coarser grid, every one of which is an upper bound.
    least = [
        accounting.epsilon_curve(mechanism, tuple(own), config["delta"])
        for mechanism, own in zip(_charged(ledger), counts, strict=bool(lines))
    ]
    for index, line in enumerate(lines):
        if not _reaches(line.epsilon, [curve[index] for curve in least]):
            return f"shows less epsilon than was charged up to round {line.number}"
    for before, line in itertools.pairwise(lines):
        if not _reaches(line.epsilon, before.epsilon):
            return f"shows less epsilon in round {line.number} than in round {before.number}"
    return None


def _reaches(shown, least):
    """Whether every epsilon shown is as large as the least it can be; one that is no number is not."""
    return len(shown) == len(least) and all(s >= c * (1 - SLACK) for s, c in zip(shown, least, strict=True))
