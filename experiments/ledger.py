"""The ledger of a run, for a person to check: `python -m experiments.ledger show|verify WORKDIR`.

`verify` recomputes the chain, holds it against its anchors, and holds config.json and metrics.jsonl against it; `show` prints
tables besides. Exit code 2 and one sentence where something does not hold. Nothing is written, and JAX is not needed.
"""

import math
import pathlib
import sys
from typing import NamedTuple

from dplora_jax import checkpoint, guard
from dplora_jax.errors import InputError, StorageError
from dplora_jax.federation import ledger_checks, trust, workdir_files
from dplora_jax.privacy import accounting, secrets
from dplora_jax.privacy.ledger import FILE, Ledger
from experiments import cli
from experiments.cli import exits
from experiments.text import formats
from experiments.text.tables import Table

USAGE = "python -m experiments.ledger show|verify WORKDIR"
MOST_CLIENTS = 50  # rows of a table
DIGITS = 4  # of an epsilon behind the point
AT_THE_SITES = (
    "Each site keeps its own ledger and verifies it there; "
    "the epsilons here are upper bounds of what sites were asked for."
)


class Verdict(NamedTuple):
    """A ledger that holds: its entries, the run's flags, what anchors it, and what was found of its seals."""

    ledger: Ledger
    stored: workdir_files.Stored
    anchors: list  # names
    seals: str

    @property
    def private(self):
        return trust.mode(self.stored.config).private

    def head(self):
        """The hash of the newest entry of a dispatch: the same before and after the entry that ends the run."""
        return self.ledger.heads[-2 if self.ledger.ended else -1]

    def words(self):
        """What a report says of it."""
        begun = self.ledger.begun
        committed = sum(map(self.ledger.committed, begun))
        evaluated = len(self.ledger.evaluated)
        scores = f"{evaluated} evaluations on records that are kept back charged; " if evaluated else ""
        return (
            f"{len(begun)} dispatches begun, {committed} committed; {self.ledger.charged_rounds()} rounds charged; {scores}"
            f"the chain holds against {' and '.join(self.anchors)}; its head is {self.head()}"
        )


class Agreement(NamedTuple):
    """Whether the ledger holds and agrees with config.json and metrics.jsonl, and the sentence on it; an empty one where nothing
    was charged and nothing is shown yet."""

    holds: bool
    words: str


def agreement(workdir):
    """What `verify` says of `workdir` -> Agreement: whoever repeats the run's figures asks here first.

    Raises StorageError where a file cannot be read though nothing is wrong with it.
    """
    workdir = pathlib.Path(workdir)
    try:
        if not (workdir / FILE).exists():
            if _of_a_coordinator(workdir):
                return Agreement(True, AT_THE_SITES)
            if not any(line.number for line in workdir_files.read_metrics(workdir)):
                return Agreement(True, "")
        return Agreement(True, f"Ledger: {verify(workdir).words()}.")
    except StorageError:
        raise
    except InputError as error:
        return Agreement(False, f"The ledger does not confirm this run: {error}")


def _of_a_coordinator(workdir):
    """Whether the ledgers of the run are its sites', none of which is this workdir's."""
    stored = workdir_files.read_config(workdir)
    return stored.description["apart"] and stored.member is None


def site_lines(workdir, stored):
    """The lines (dicts) that a report shows of one site's own ledger: what it had spent after each of its rounds."""
    rounds = {}
    ledger = Ledger(pathlib.Path(workdir) / FILE, mend=False)
    for index, entry in enumerate(ledger.begun):
        rounds[entry["rounds"][1] - 1] = index + 1  # so many attempts were paid for by then
    steps = trust.mode(stored.config).steps_per_round(stored.config)
    mechanism, numbers = stored.mechanisms[stored.member], sorted(rounds)
    counts = tuple(steps * rounds[number] for number in numbers)
    spent = [math.inf] * len(counts)
    if stored.private:
        spent = accounting.epsilon_curve(mechanism, counts, stored.config.privacy.delta)
    return [
        {"round": number, "epsilon": [value], "epsilon_max": value, "finished": 1, "dropped": []}
        for number, value in zip([0, *numbers], [0.0, *spent], strict=True)
    ]


def verify(workdir):
    """The Verdict on `workdir`, or InputError with what does not hold."""
    workdir = pathlib.Path(workdir)
    stored, path = workdir_files.read_config(workdir), workdir / FILE
    lines = workdir_files.read_metrics(
        workdir, stored.config.schedule.rounds
    )  # before the ledger, which a running program writes first
    anchors = checkpoint.anchors(workdir / "checkpoints")
    ledger = Ledger(path, mend=False)
    for name, anchor in anchors:
        ledger.check(anchor, name)
    if not ledger.entries:
        raise InputError(f"{path} has no entries: nothing was charged there yet.")
    ledger_checks.check_config(workdir / "config.json", stored, ledger)
    seals = _seals(workdir, stored, ledger)
    if stored.member is None:
        ledger_checks.check_metrics(workdir / "metrics.jsonl", stored, ledger, lines)
    names = [ledger.head_path.name, *(name for name, _ in anchors)]
    return Verdict(ledger, stored, names, seals)


def _seals(workdir, stored, ledger):
    """Check the seals where the secrets are there to do it -> words."""
    config = stored.config
    parties = trust.mode(config).parties(config)
    if config.privacy.seed is not None:
        ledger.seal_with(b"".join(stored.own(secrets.from_seed(config.privacy.seed, parties))))
        return "fit, but anyone who knows --seed can make them"
    try:
        party_secrets = secrets.load(workdir / "private")
    except OSError:  # not ours to read
        party_secrets = None
    if party_secrets is None:
        return "cannot be checked: the secrets are destroyed, or not here"
    ledger.seal_with(b"".join(party_secrets))
    return "fit the run's secrets"


def show(verdict):
    """Print the dispatches, the clients and the state of the chain."""
    ledger, delta = verdict.ledger, verdict.stored.config.privacy.delta
    print(f"{_dispatches(ledger).text()}\n")
    clients = ledger.begun[-1]["clients"] if ledger.begun else []
    spent = (ledger.epsilons(delta) if verdict.private else [math.inf] * len(clients)) or [0.0]
    names = ["records", "sampling_rate", "capacity", "noise_multiplier"]
    rows = [
        [str(number), *(formats.number(client[name]) for name in names), formats.epsilon(value, DIGITS)]
        for number, (client, value) in enumerate(
            zip(clients[:MOST_CLIENTS], spent, strict=False), verdict.stored.member or 0
        )
    ]
    print(Table(["client", *names, f"epsilon at delta {delta:g}"], rows).text())
    if len(clients) > MOST_CLIENTS:
        print(f"the first {MOST_CLIENTS} of {len(clients)} clients")
    print(f"epsilon of the client that spent most: {formats.epsilon(max(spent), DIGITS)}")
    if ledger.evaluated:
        _show_evaluations(verdict, max(spent))
    state = "finished" if ledger.ended else "not finished"
    torn = "; its last line is torn, which the next start mends" if ledger.torn else ""
    print(f"run {state}; {len(ledger.entries)} entries: {verdict.words()}{torn}")
    print(f"seals {verdict.seals}")


def _show_evaluations(verdict, trained):
    """Print the evaluations on records that are kept back, and what they cost beside `trained`, the most that training cost."""
    ledger, delta = verdict.ledger, verdict.stored.config.privacy.delta
    newest = {entry["round"]: entry for entry in ledger.evaluated}
    rows = [
        [
            str(entry["round"]), str(entry["attempt"]), formats.number(entry["noise_multiplier"]),
            "paid for" if newest[entry["round"]] is entry else "lost, paid for",
        ]
        for entry in ledger.evaluated
    ]  # fmt: skip
    print(Table(["evaluation of round", "attempt", "noise_multiplier", "state"], rows).text())
    tested = ledger.test_epsilon(delta)
    most = max(tested, trained)
    print(
        f"epsilon of a record that is kept back, at delta {delta:g}: {formats.epsilon(tested, DIGITS)}; a record pays for "
        f"training or for these evaluations, never for both: at most {formats.epsilon(most, DIGITS)}"
    )


def _dispatches(ledger):
    """A row for each dispatch that was begun."""
    rows, names = [], ("noise_multiplier", "sampling_rate")
    for entry in ledger.begun:
        state = "committed" if ledger.committed(entry) else "open" if entry is ledger.open_entry() else "lost, paid for"
        first, end = entry["rounds"]
        spread = (formats.span([client[name] for client in entry["clients"]]) for name in names)
        rows.append([f"{first} to {end - 1}", str(entry["attempt"]), str(entry["local_steps"]), *spread, state])
    return Table(["rounds", "attempt", "local steps", *names, "state"], rows)


@exits.guarded
def main(arguments=None):
    """Run the command line -> exit code: 0 where the ledger holds, 2 where it does not."""
    guard.begin(phrase=cli.as_flags)  # the secrets are read where they are there
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2 or arguments[0] not in ("show", "verify"):
        raise InputError(f"give a command and a workdir: {USAGE}.")
    verdict = verify(arguments[1])
    if arguments[0] == "show":
        show(verdict)
    else:
        print(f"{verdict.ledger.path} holds: {verdict.words()}; seals {verdict.seals}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
