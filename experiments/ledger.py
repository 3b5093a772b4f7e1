"""The ledger of a run, for a person to check: `python -m experiments.ledger show|verify WORKDIR`.

`verify` recomputes the chain, holds it against its anchors, and holds config.json and metrics.jsonl against it; `show` prints
tables besides. Exit code 2 and one sentence where something does not hold. Nothing is written, and JAX is not needed.
"""

import math
import pathlib
import sys
from typing import Any, NamedTuple

from dplora_jax import checkpoint, guard
from dplora_jax.errors import InputError
from dplora_jax.federation import ledger_checks, run_files, trust_modes
from dplora_jax.privacy import secrets
from dplora_jax.privacy.ledger import FILE, Ledger
from experiments import exits

USAGE = "python -m experiments.ledger show|verify WORKDIR"
MOST_CLIENTS = 50  # rows of a table


class Verdict(NamedTuple):
    """A ledger that holds: its entries, the run's flags, what anchors it, and what was found of its seals."""

    ledger: Ledger
    told: run_files.Told
    anchors: list  # names
    seals: str

    @property
    def private(self):
        return self.told.flags.privacy.private

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
    told, path = run_files.read_config(workdir), workdir / FILE
    lines = run_files.read_metrics(
        workdir, told.flags.schedule.rounds
    )  # before the ledger, which a running program writes first
    anchors = checkpoint.anchors(workdir / "checkpoints")
    ledger = Ledger(path, mend=False)
    for name, anchor in anchors:
        ledger.check(anchor, name)
    if not ledger.entries:
        raise InputError(f"{path} has no entries: nothing was charged there yet.")
    ledger_checks.check_config(workdir / "config.json", told, ledger)
    seals = _seals(workdir, told.flags, ledger)
    ledger_checks.check_metrics(workdir / "metrics.jsonl", told, ledger, lines)
    names = [ledger.head_path.name, *(name for name, _ in anchors)]
    return Verdict(ledger, told, names, seals)


def _seals(workdir, config, ledger):
    """Check the seals where the secrets are there to do it -> words."""
    parties = trust_modes.mode(config).parties(config)
    if config.privacy.seed is not None:
        ledger.seal_with(b"".join(secrets.from_seed(config.privacy.seed, parties)))
        return "fit, but anyone who knows --seed can make them"
    try:
        held = secrets.load(workdir / "private")
    except OSError:  # not ours to read
        held = None
    if held is None:
        return "cannot be checked: the secrets are destroyed, or not here"
    ledger.seal_with(b"".join(held))
    return "fit the run's secrets"


def show(verdict, console):
    """Print the dispatches, the clients and the state of the chain."""
    from rich.table import Table

    ledger, delta = verdict.ledger, verdict.told.flags.privacy.delta
    table = Table("rounds", "attempt", "local steps", "noise_multiplier", "sampling_rate", "state")
    for entry in ledger.begun:
        state = "committed" if ledger.committed(entry) else "open" if entry is ledger.open_entry() else "lost, paid for"
        first, end = entry["rounds"]
        spread = (_spread(entry["clients"], name) for name in ("noise_multiplier", "sampling_rate"))
        words = (f"{first} to {end - 1}", entry["attempt"], entry["local_steps"], *spread, state)
        table.add_row(*map(str, words))
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


@exits.guarded
def main(arguments=None):
    """Run the command line -> exit code: 0 where the ledger holds, 2 where it does not."""
    from rich.console import Console

    guard.begin()  # the secrets are read where they are there
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2 or arguments[0] not in ("show", "verify"):
        raise InputError(f"give a command and a workdir: {USAGE}.")
    verdict = verify(arguments[1])
    if arguments[0] == "show":
        show(verdict, Console())
    else:
        print(f"{verdict.ledger.path} holds: {verdict.words()}; seals {verdict.seals}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
