"""The write-ahead ledger: one entry a dispatch, durable before it runs, committed after its checkpoint is.

An entry is {"entry": "begin", "rounds": [a, b], "attempt": n, "local_steps": s, "clients": [what each client's steps are],
"inputs": {name: HMAC of what the run works with}, ...}, then {"entry": "commit", ...} of the same rounds and attempt, and
at last {"entry": "end"}; `chain` says how entries are kept from being changed. epsilon is recomputed from the begin entries
alone: what was begun is paid for, whether or not it came back.
"""

import dataclasses

from dplora_jax.errors import InputError
from dplora_jax.privacy import accounting
from dplora_jax.privacy.chain import ADVICE, Chain

FILE = "privacy_ledger.jsonl"
KEYS = {
    "begin": ("rounds", "attempt", "clients", "local_steps", "inputs"),
    "commit": ("rounds", "attempt"),
    "end": (),
}
KINDS = {"truncated_poisson_gaussian": accounting.Mechanism}  # kind -> a frozen dataclass that accounting composes


def describe(mechanism):
    """A mechanism as a JSON object, {"kind": its kind, **its fields}: all of it public."""
    kind = next(kind for kind, of in KINDS.items() if type(mechanism) is of)
    return {"kind": kind, **dataclasses.asdict(mechanism)}


def rebuild(description):
    """The mechanism of a `describe`d object; InputError for one that this version does not know."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in description.items() if k != "kind"}
    try:
        return KINDS[description["kind"]](**fields)
    except (KeyError, TypeError):
        raise InputError(
            f"the ledger speaks of a mechanism that this version does not know ({description}): use the version that wrote it."
        ) from None


def steps_of(entry):
    """How many steps a begin entry charges each client for: all its rounds', or by "steps" those of the rounds that it is in."""
    rounds = entry["rounds"][1] - entry["rounds"][0]
    return entry.get("steps", [rounds * entry["local_steps"]] * len(entry["clients"]))


class Ledger(Chain):
    """The entries of one file, read at the start and appended to durably."""

    def __init__(self, path, mend=True):
        super().__init__(path, mend)
        begun, open_, ended = set(), set(), False
        for number, entry in enumerate(self.entries, 1):
            kind = entry.get("entry")
            if kind not in KEYS or not all(key in entry for key in KEYS[kind]):
                raise InputError(f"{self.path} is damaged: line {number} is no entry; {ADVICE}")
            wrong = "stands after the end of the run" if ended else None
            if kind == "begin":
                used = {(r, entry["attempt"]) for r in range(*entry["rounds"])}
                wrong = wrong or ("begins rounds whose keys an earlier entry used" if used & begun else None)
                begun |= used
                open_.add((*entry["rounds"], entry["attempt"]))
            elif kind == "commit":
                done = (*entry["rounds"], entry["attempt"])
                wrong = wrong or (None if done in open_ else "commits what was not begun")
                open_.discard(done)
            ended = ended or kind == "end"
            if wrong:
                raise InputError(f"{self.path} does not hold: entry {number} {wrong}; {ADVICE}")

    def _of(self, kind):
        return [entry for entry in self.entries if entry["entry"] == kind]

    @property
    def ended(self):
        """Whether the run has come to its end."""
        return bool(self._of("end"))

    @property
    def begun(self):
        """The begin entries, oldest first."""
        return self._of("begin")

    def committed(self, entry):
        """Whether a commit followed the begin entry `entry`."""
        return any((e["rounds"], e["attempt"]) == (entry["rounds"], entry["attempt"]) for e in self._of("commit"))

    def open_entry(self):
        """The newest begin entry if no commit followed it, else None."""
        last = self.begun[-1] if self.begun else None
        return None if last is None or self.committed(last) else last

    def next_attempt(self, rounds):
        """An attempt number whose keys no begun dispatch has used for any of `rounds` [a, b)."""
        used = [e["attempt"] for e in self.begun if e["rounds"][0] < rounds[1] and rounds[0] < e["rounds"][1]]
        return max(used, default=-1) + 1

    def begin(self, rounds, attempt, mechanisms, local_steps, inputs, **more):
        """Charge a dispatch before it runs. `inputs` {name: hex} are keyed digests of records and base model; `more` is written
        along (JSON values)."""
        self.append(
            entry="begin",
            rounds=list(rounds),
            attempt=attempt,
            local_steps=local_steps,
            clients=[describe(mechanism) for mechanism in mechanisms],
            inputs=inputs,
            **more,
        )

    def commit(self, rounds, attempt):
        """Say that the dispatch's checkpoint is durable."""
        self.append(entry="commit", rounds=list(rounds), attempt=attempt)

    def charged_rounds(self):
        """How many rounds have been paid for, repeated attempts included."""
        return sum(entry["rounds"][1] - entry["rounds"][0] for entry in self.begun)

    def charged_steps(self, clients):
        """How many steps each of `clients` clients has paid for, repeated attempts included."""
        return [sum(column) for column in zip([0] * clients, *map(steps_of, self.begun), strict=True)]

    def epsilons(self, delta, planned=()):
        """Each client's epsilon at `delta`, recomputed from every begin entry, and from `planned` ones: the composition of all
        their steps."""
        steps = {}
        for entry in (*self.begun, *planned):
            charged = steps_of(entry)
            for client, description in enumerate(entry["clients"]):
                key = client, rebuild(description)
                steps[key] = steps.get(key, 0) + charged[client]
        spent = {}
        for (client, mechanism), count in steps.items():
            spent.setdefault(client, []).append((mechanism, count))
        return [accounting.composed(tuple(spent[client]), delta) for client in sorted(spent)]
