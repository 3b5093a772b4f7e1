"""The ledger of a run, for a person to check: `python -m experiments.ledger show|verify WORKDIR`.

`verify` recomputes the chain, holds it against its anchors, and holds config.json and metrics.jsonl against it; `show` prints
tables besides. Exit code 2 and one sentence where something does not hold. Nothing is written, and JAX is not needed.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import sys
from typing import Any, NamedTuple

from dplora_jax import checkpoint
from dplora_jax.errors import InputError
from dplora_jax.privacy import accounting, secrets
from dplora_jax.privacy.ledger import FILE, Ledger, rebuild

USAGE = "python -m experiments.ledger show|verify WORKDIR"
MOST_CLIENTS = 50  # rows of a table
SLACK = (
    1e-3  # by which a recomputed epsilon may exceed the one shown: another version of the accountant, another machine
)
COARSE = 1e-2  # the accountant's grid for the rounds within a dispatch
DAMAGES = (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)  # of a file's JSON


class Line(NamedTuple):
    """What a line of metrics.jsonl says of privacy."""

    number: int
    epsilon: list  # a float a client
    largest: float
    release: str | None


class Verdict(NamedTuple):
    """A ledger that holds: its entries, the run's flags, what anchors it, and what was found of its seals."""

    ledger: Ledger
    config: dict
    anchors: list  # names
    seals: str

    @property
    def private(self):
        return self.config["trust"] != "none"

    def head(self):
        """The hash of the newest entry of a dispatch: the same before and after the entry that ends the run."""
        return self.ledger.heads[-2 if self.ledger.ended else -1]

    def words(self):
        """What a report says of it."""
        begun = self.ledger.begun
        committed = sum(map(self.ledger.committed, begun))
        return (
            f"{len(begun)} dispatches begun, {committed} committed; {self.ledger.charged_rounds()} rounds charged; "
            f"the chain holds against {' and '.join(self.anchors)}; its head is {self.head()}"
        )


def verify(workdir):
    """The Verdict on `workdir`, or InputError with what does not hold."""
    workdir = pathlib.Path(workdir)
    config, path = _config(workdir), workdir / FILE
    lines = _metrics(workdir)  # before the ledger, which a running program writes first
    anchors = checkpoint.anchors(workdir / "checkpoints")
    ledger = Ledger(path, mend=False)
    for name, anchor in anchors:
        ledger.check(anchor, name)
    if not ledger.entries:
        raise InputError(f"{path} has no entries: nothing was charged there yet.")
    _check_config(workdir / "config.json", config, ledger)
    seals = _seals(workdir, config, ledger)
    _check_metrics(workdir / "metrics.jsonl", config, ledger, lines)
    names = [ledger.head_path.name, *(name for name, _ in anchors)]
    return Verdict(ledger, config, names, seals)


def _config(workdir):
    """config.json, with every field there that is held against the ledger."""
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        facts, budget, noise = config["federation"], config["epsilon"], config["noise_multiplier"]
        _mechanisms(config), [(_real(row["epsilon"]), row["records"]) for row in facts["clients"]]
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
    except DAMAGES:
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


def _mechanisms(config):
    """Each client's mechanism as config.json has it: what an earlier version did not write is at its default."""
    names = [field.name for field in dataclasses.fields(accounting.Mechanism)]
    own = (
        {"records": config["clients"]} if config["trust"] == "client" else {}
    )  # its rows tell the clients' own records
    rows = config["federation"]["clients"]
    return [accounting.Mechanism(**{name: row[name] for name in names if name in row} | own) for row in rows]


def _charged(ledger):
    """Each client's mechanism as the ledger has it: one and the same in all its entries, once `_check_config` has passed."""
    return [rebuild(client) for client in ledger.begun[0]["clients"]]


def _steps(config):
    """Steps of the mechanism in a round: in mode `client` a whole update is one."""
    return 1 if config["trust"] == "client" else config["local_steps"]


def _seals(workdir, config, ledger):
    """Check the seals where the secrets are there to do it -> words."""
    if config["seed"] is not None:
        parties = config["clients"] + (config["trust"] == "client")  # there, the server has a secret too
        ledger.seal_with(b"".join(secrets.from_seed(config["seed"], parties)))
        return "fit, but anyone who knows --seed can make them"
    path = workdir / "private" / secrets.FILE
    gone = "cannot be checked: the secrets are destroyed, or not here"
    try:
        held = path.read_bytes()
        if b"\0" in held:  # killed between their overwriting and their removal
            return gone
        secret = b"".join(map(bytes.fromhex, json.loads(held)))
    except OSError:
        return gone
    except DAMAGES:
        raise InputError(f"{path} is damaged: restore it.") from None
    ledger.seal_with(secret)
    return "fit the run's secrets"


def _check_config(path, config, ledger):
    """Release, guarantee, mechanisms and steps of every begin entry are those of config.json, and the epsilon that it plans
    for each client is what these come to."""
    mechanisms, steps, seed = _mechanisms(config), _steps(config), config["seed"]
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
        other += ["sampling or noise"] if [rebuild(client) for client in entry["clients"]] != mechanisms else []
        if other:
            raise InputError(f"{path} does not agree with the ledger: entry {number} has other {', '.join(other)}.")
    sigma = config["noise_multiplier"]
    budget = math.inf if config["epsilon"] is None else _real(config["epsilon"])
    for client, (row, mechanism) in enumerate(zip(config["federation"]["clients"], _charged(ledger), strict=True)):
        least = accounting.epsilon(mechanism, config["rounds"] * steps, config["delta"]) * (1 - SLACK)
        planned = _real(row["epsilon"])
        if not least <= planned <= budget * (1 + SLACK) or math.isfinite(planned) != private:
            raise InputError(
                f"{path} does not agree with the ledger: client {client}'s epsilon does not follow from it."
            )
        if sigma is not None and sigma != mechanism.noise_multiplier:
            raise InputError(f"{path} does not agree with the ledger: noise_multiplier is not client {client}'s.")


def _metrics(workdir):
    """The Lines of metrics.jsonl; none where there is no such file yet."""
    path = workdir / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        lines = [
            Line(v["round"], [_real(e) for e in v["epsilon"]], _real(v["epsilon_max"]), v.get("release")) for v in lines
        ]
        sound = all(type(line.number) is int for line in lines)
    except DAMAGES:
        sound = False
    if not sound:
        raise InputError(f"{path} is damaged: run the same command again to rebuild it, or restore it.")
    return lines


def _check_metrics(path, config, ledger, lines):
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
    for line in lines:
        free = not private and line.number > 0  # without privacy, all that follows the base model is infinite
        if len(line.epsilon) != config["clients"] or any(math.isfinite(value) == free for value in line.epsilon):
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
    charged, ends, inner, total = {0: 0}, set(), set(), 0
    for entry in ledger.begun:
        first, end = entry["rounds"]
        if ledger.committed(entry):
            for number in range(first, end):
                charged.setdefault(number, (total + number - first + 1) * entry["local_steps"])
            inner |= set(range(first, end - 1))
            ends.add(end - 1)
        total += end - first
    mechanisms, least = _charged(ledger), {}
    for numbers, grid in (sorted(ends | {0}), accounting.GRID), (sorted(inner - ends), COARSE):
        counts = tuple(charged[number] for number in numbers)
        for mechanism in set(mechanisms):
            curve = accounting.epsilon_curve(mechanism, counts, config["delta"], grid)
            least |= {(mechanism, number): value for number, value in zip(numbers, curve, strict=True)}
    for line in lines:
        if not _reaches(line.epsilon, [least[mechanism, line.number] for mechanism in mechanisms]):
            return f"shows less epsilon than was charged up to round {line.number}"
    # The last line of a dispatch is on a finer grid than those within: it alone may show less than the one before.
    rising = [(a, b) for a, b in itertools.pairwise(lines) if b.number not in ends]
    rising += itertools.pairwise([line for line in lines if line.number not in inner])
    for before, line in rising:
        if not _reaches(line.epsilon, before.epsilon):
            return f"shows less epsilon in round {line.number} than in round {before.number}"
    return None


def _reaches(shown, least):
    """Whether every epsilon shown is as large as the least it can be; one that is no number is not."""
    return len(shown) == len(least) and all(s >= c * (1 - SLACK) for s, c in zip(shown, least, strict=True))


def show(verdict, console):
    """Print the dispatches, the clients and the state of the chain."""
    from rich.table import Table

    ledger, delta = verdict.ledger, verdict.config["delta"]
    table = Table("rounds", "attempt", "local steps", "noise_multiplier", "sampling_rate", "state", "other than before")
    before = None
    for entry in ledger.begun:
        state = "committed" if ledger.committed(entry) else "open" if entry is ledger.open_entry() else "lost, paid for"
        causes = entry["causes"]
        changed = sorted(n for n in before | causes if before.get(n) != causes.get(n)) if before is not None else []
        first, end = entry["rounds"]
        spread = (_spread(entry["clients"], name) for name in ("noise_multiplier", "sampling_rate"))
        words = (f"{first} to {end - 1}", entry["attempt"], entry["local_steps"], *spread, state, ", ".join(changed))
        table.add_row(*map(str, words))
        before = causes
    console.print(table)
    names = ("records", "sampling_rate", "capacity", "noise_multiplier")
    table = Table("client", *names, f"epsilon at delta {delta:g}")
    clients = ledger.begun[-1]["clients"]
    spent = ledger.epsilons(delta) if verdict.private else [math.inf] * len(clients)
    for number, (client, value) in enumerate(zip(clients, spent, strict=True)):
        if number < MOST_CLIENTS:
            table.add_row(str(number), *(_number(client.get(name)) for name in names), f"{_upwards(value)}")
    console.print(table)
    if len(clients) > MOST_CLIENTS:
        console.print(f"the first {MOST_CLIENTS} of {len(clients)} clients")
    console.print(f"epsilon of the client that spent most: {_upwards(max(spent))}")
    state = "finished" if ledger.ended else "not finished"
    torn = "; its last line is torn, which the next start mends" if ledger.torn else ""
    console.print(
        f"run {state}; {len(ledger.entries)} entries: {verdict.words()}{torn}", soft_wrap=True, highlight=False
    )
    console.print(f"seals {verdict.seals}", soft_wrap=True, highlight=False)


def _number(value: Any):
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _upwards(epsilon):
    """An epsilon as text, rounded up."""
    return f"{math.ceil(epsilon * 1e4 - 1e-6) / 1e4:.4f}" if math.isfinite(epsilon) else "infinite"


def _spread(clients, name):
    """The values of the clients' field, or from the least to the most."""
    values = sorted({client[name] for client in clients if name in client})
    return " to ".join(_number(value) for value in dict.fromkeys([*values[:1], *values[-1:]]))


def main(arguments=None):
    """Run the command line -> exit code: 0 where the ledger holds, 2 where it does not."""
    from rich.console import Console

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if len(arguments) != 2 or arguments[0] not in ("show", "verify"):
            raise InputError(f"give a command and a workdir: {USAGE}.")
        verdict = verify(arguments[1])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments[0] == "show":
        show(verdict, Console())
    else:
        print(f"{verdict.ledger.path} holds: {verdict.words()}; seals {verdict.seals}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
