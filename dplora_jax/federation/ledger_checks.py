"""config.json and metrics.jsonl (`workdir_files`), held against their own fields and against the ledger; no JAX."""

import itertools
import math

import numpy as np

from dplora_jax.errors import InputError
from dplora_jax.federation import calibration, held_out, participation, trust
from dplora_jax.privacy import accounting
from dplora_jax.privacy.ledger import charges, rebuild, steps_of

# By which a recomputed epsilon may exceed the one shown: another version of the accountant, another machine.
SLACK = 1e-3
NOISE_SLACK = 2e-3  # of a recalibrated noise, likewise
MOST_EPSILONS = 1000  # that are reckoned anew of the lines of metrics.jsonl


def _check_flags(path, stored):
    """Every client's mechanism is the one that the fields and the clients' sizes decide: sampling, capacity, bands, noise."""
    try:
        mechanisms = calibration.mechanisms(stored.config, stored.records)
    except InputError as error:
        raise InputError(f"{path} does not hold: {error}") from None
    except (ArithmeticError, ValueError, MemoryError):  # dp_accounting's, of numbers that no run has
        raise InputError(f"{path} does not hold: no mechanism can be made of its fields and sizes.") from None
    for client, (stored_one, decided) in enumerate(zip(stored.mechanisms, mechanisms, strict=True)):
        if other := differ(stored_one, decided):
            raise InputError(
                f"{path} does not hold: client {client}'s {', '.join(other)} do not follow from its fields and sizes."
            )


def differ(said, decided):
    """Names of the fields in which two mechanisms differ by more than another machine's arithmetic explains."""
    names = [name for name in ("records", "sampling_rate", "bands") if getattr(said, name) != getattr(decided, name)]
    mean = decided.part * decided.join_rate
    if abs(said.capacity - decided.capacity) > 2 + math.sqrt(mean * (1 - decided.join_rate)) / 10:
        names.append("capacity")
    for name in ("noise_multiplier", "count_noise"):
        if not math.isclose(getattr(said, name), getattr(decided, name), rel_tol=NOISE_SLACK):
            names.append(name)
    return names


def _reached(config):
    """int [rounds + 1, K]: the steps of the mechanism that each client takes up to each round, by the public schedule."""
    taken = np.cumsum(participation.schedule(config), 0, np.int32)
    rounds_before = np.concatenate([np.zeros((1, config.schedule.clients), np.int32), taken])
    return rounds_before * np.int32(trust.mode(config).steps_per_round(config))


def check_config(path, stored, ledger):
    """Release, guarantee, mechanisms and steps of every begin entry are those of config.json, its mechanisms are those of its
    flags, and the epsilon that it plans for each client is what these come to."""
    _check_entries(path, stored, ledger)
    _check_flags(path, stored)
    _check_evaluations(path, stored, ledger)
    _check_planned(path, stored)


def _check_entries(path, stored, ledger):
    """Every begin entry agrees with config.json."""
    config, reached = stored.config, _reached(stored.config)
    follows = (
        ("for release" if config.privacy.seed is None else "NOT FOR RELEASE")
        if trust.mode(config).private
        else "NO PRIVACY"
    )
    if not stored.release.startswith(follows):
        raise InputError(
            f"{path} does not hold: it says {stored.release!r}, and by its trust and seed the run is {follows}."
        )
    same = _said(stored) | {"local_steps": trust.mode(config).steps_per_round(config)}
    checked = None  # the clients of the entry before, which a ledger holds once
    for number, entry in enumerate(ledger.entries, 1):
        if entry["entry"] != "begin":
            continue
        first, end = entry["rounds"]
        other = [name for name, value in same.items() if entry.get(name, value) != value]
        other += ["seed"] if "nonce" in entry and config.privacy.seed is not None else []
        if end - 1 > config.schedule.rounds:
            other += ["rounds"]
        elif steps_of(entry) != stored.own((reached[end - 1] - reached[first - 1]).tolist()):
            other += ["clients in its rounds"]
        if entry["clients"] is not checked and [rebuild(client) for client in entry["clients"]] != stored.own(
            stored.mechanisms
        ):
            other += ["sampling or noise"]
        if other:
            raise InputError(f"{path} does not agree with the ledger: entry {number} has other {', '.join(other)}.")
        checked = entry["clients"]


def _said(stored):
    """What every entry that charges says of the run."""
    privacy = stored.config.privacy
    return {"release": stored.release, "trust": privacy.trust, "delta": privacy.delta, "config": stored.digest}


def _check_evaluations(path, stored, ledger):
    """Every evaluate entry is one that the run's fields allow: as many as were planned, of the noise that these need; and
    config.json says of them what follows from its fields."""
    config, planned = stored.config, stored.description["private_test"]
    if not config.private_test.share:
        if ledger.evaluated or planned:
            raise InputError(
                f"{path} does not agree with the ledger: nothing is kept back, and scores on it are charged."
            )
        return
    if planned is None or len(planned["units"]) != config.schedule.clients:
        raise InputError(f"{path} does not hold: it does not say what each client keeps back.")
    everyone = [kept + trained for kept, trained in zip(planned["units"], stored.records, strict=True)]
    try:
        cost = held_out.cost(config, held_out.kept_back(config, everyone))
    except (ArithmeticError, ValueError, MemoryError):
        raise InputError(f"{path} does not hold: no noise can be made of its `private_test_epsilon`.") from None
    agrees = (cost.units, cost.evaluations) == (planned["units"], planned["evaluations"])
    for name in ("noise_multiplier", "epsilon"):
        agrees &= math.isclose(planned[name], getattr(cost, name), rel_tol=NOISE_SLACK)
    if not agrees:
        raise InputError(
            f"{path} does not hold: what it says of `private_test` does not follow from its fields and sizes."
        )
    same = _said(stored) | {"noise_multiplier": planned["noise_multiplier"]}
    for number, entry in enumerate(ledger.entries, 1):
        if entry["entry"] != "evaluate":
            continue
        other = [name for name, value in same.items() if entry[name] != value]
        other += ["round"] if entry["round"] > config.schedule.rounds else []
        if other:
            raise InputError(f"{path} does not agree with the ledger: entry {number} has other {', '.join(other)}.")
    if len(ledger.evaluated) > cost.evaluations:
        raise InputError(
            f"{path} does not agree with the ledger: it plans {cost.evaluations} evaluations, and "
            f"{len(ledger.evaluated)} were charged."
        )


def _check_planned(path, stored):
    """The epsilon that config.json plans for each client is what its mechanism and steps come to, and within the budget."""
    config, steps = stored.config, participation.total_steps(stored.config).tolist()
    budget = math.inf if config.privacy.epsilon is None else config.privacy.epsilon
    for client, (planned, mechanism) in enumerate(zip(stored.epsilons, stored.mechanisms, strict=True)):
        least = accounting.epsilon(mechanism, steps[client], config.privacy.delta) * (1 - SLACK)
        never = not trust.mode(config).private and not steps[client]  # and so not without privacy either
        if not least <= planned <= budget * (1 + SLACK) or math.isfinite(planned) != (
            trust.mode(config).private or never
        ):
            raise InputError(
                f"{path} does not agree with the ledger: client {client}'s epsilon does not follow from it."
            )
        if (
            config.privacy.noise_multiplier is not None
            and config.privacy.noise_multiplier != mechanism.noise_multiplier
        ):
            raise InputError(f"{path} does not agree with the ledger: noise_multiplier is not client {client}'s.")


def check_metrics(path, stored, ledger, lines):
    """Every line of metrics.jsonl is one that the run can have written when it had been charged as the ledger says."""
    wrong = _wrong_metrics(stored, ledger, lines)
    if wrong:
        raise InputError(f"{path} does not agree with the ledger: it {wrong}.")


def _wrong_metrics(stored, ledger, lines):
    """What no honest run writes, in words, or None."""
    config, reached = stored.config, _reached(stored.config)
    last = _last_committed(ledger)
    if early := next((line.number for line in lines if line.number > last), None):
        return f"shows round {early}, which was never committed"
    if any(line.number != index for index, line in enumerate(lines)):
        return "does not show each round from 0 on once, in order"
    for line in lines:
        # Without privacy, all that follows a client's first round is infinite.
        free = [not trust.mode(config).private and bool(client_steps) for client_steps in reached[line.number]]
        if len(line.epsilon) != config.schedule.clients or free != [not math.isfinite(value) for value in line.epsilon]:
            return f"has no epsilon for each client in round {line.number}"
        if line.largest != max(line.epsilon):
            return f"has another epsilon_max in round {line.number} than its largest epsilon"
        if line.release not in (None, stored.release):
            return f"says {line.release!r} of round {line.number}, and the ledger {stored.release!r}"
    if wrong := _uncharged(ledger, lines):
        return wrong
    if wrong := _understated(stored, _charged_when_shown(ledger, reached, lines), lines):
        return wrong
    if ledger.ended:
        last = next(entry for entry in ledger.entries if entry["entry"] == "end").get("round")
        if not lines or lines[-1].number != last:
            return f"does not end with round {last}, the run's last"
        if trust.mode(config).private and not _reaches(lines[-1].epsilon, ledger.epsilons(config.privacy.delta)):
            return "shows less epsilon than was charged"
    return None


def _uncharged(ledger, lines):
    """Which line shows scores on what is kept back that were not charged, or less than they had cost, in words; else None."""
    spent = {
        entry["round"]: accounting.full_epsilon([entry["noise_multiplier"]] * charged, entry["delta"])
        for charged, entry in enumerate(ledger.evaluated, 1)
    }
    for line in lines:
        shown = [name for name in line.values if name.startswith("private_")]
        if shown and line.number not in spent:
            return f"shows {shown[0]} of round {line.number}, which was never charged"
        if shown and not _reaches([line.values.get("private_test_epsilon", -1.0)], [spent[line.number]]):
            return f"shows less private_test_epsilon in round {line.number} than was charged"
    return None


def _last_committed(ledger):
    """The last round before which, and with which, all were committed."""
    last = 0
    for entry in ledger.begun:
        if ledger.committed(entry) and entry["rounds"][0] <= last + 1:
            last = max(last, entry["rounds"][1] - 1)
    return last


def _charged_when_shown(ledger, reached, lines):
    """int [K] for each of the lines of rounds 0, 1, ...: the steps that each client had been charged when the round was first
    committed. (A charge that came later, for a round lost and run again, is in the last line alone.)"""
    charged, total = [reached[0].astype(np.int64)], np.zeros(reached.shape[1], np.int64)
    for entry, steps in zip(ledger.begun, charges(ledger.begun), strict=True):
        first, end = entry["rounds"]
        if ledger.committed(entry) and first <= len(charged):
            fresh = range(len(charged), min(end, len(lines)))
            charged += [total + reached[number] - reached[first - 1] for number in fresh]
        total = total + steps
    return charged


def _understated(stored, charged, lines):
    """Which line shows less epsilon than its round had been `charged`, or less than a line before it, in words; else None.

    Of many lines some are reckoned, evenly spread; the others lie between these."""
    stride = max(1, math.ceil(len(lines) * len(set(stored.mechanisms)) / MOST_EPSILONS))
    some = lines[::-stride][::-1]
    counts = np.array([charged[line.number] for line in some]).T.tolist()
    # Lines within a dispatch may show more: they are reckoned on a coarser grid, every one of which is an upper bound.
    least = [
        accounting.epsilon_curve(mechanism, tuple(client_steps), stored.config.privacy.delta)
        for mechanism, client_steps in zip(stored.mechanisms, counts, strict=bool(lines))
    ]
    for index, line in enumerate(some):
        if not _reaches(line.epsilon, [curve[index] for curve in least]):
            return f"shows less epsilon than was charged up to round {line.number}"
    for before, line in itertools.pairwise(lines):
        if not _reaches(line.epsilon, before.epsilon):
            return f"shows less epsilon in round {line.number} than in round {before.number}"
    return None


def _reaches(shown, least):
    """Whether every epsilon shown is as large as the least it can be; one that is not a number is not."""
    return len(shown) == len(least) and all(s >= c * (1 - SLACK) for s, c in zip(shown, least, strict=True))
