"""The write-ahead ledger: one entry a dispatch, durable before it runs, committed after its checkpoint is.

An entry is {"entry": "begin", "rounds": [a, b], "attempt": n, "local_steps": s, "clients": [what each client's steps are],
"inputs": {name: HMAC of what the run works with}, ...}, then {"entry": "commit", ...} of the same rounds and attempt, and
at last {"entry": "end"}; `chain` says how entries are kept from being changed. epsilon is recomputed from the begin entries
alone: what was begun is paid for, whether or not it came back.

{"entry": "evaluate", "round": r, "attempt": n, "noise_multiplier": s, ...} charges, before it is computed, one evaluation on the
records that never train. They pay for these entries and for no others, and records that train for the begin entries alone.
"""

import bisect
import dataclasses
import itertools
import operator

from dplora_jax.errors import InputError
from dplora_jax.json_files import Unfit, hexadecimal, list_of, mapping_of, one_of, real, record, text, whole
from dplora_jax.privacy import accounting, chain
from dplora_jax.privacy.chain import ADVICE, LINK, Chain

FILE = "privacy_ledger.jsonl"
_steps = whole(0, accounting.MOST_STEPS)


def _rounds(value):
    first, end = list_of(whole(1, accounting.MOST_STEPS + 1), 2, 2)(value)
    if first >= end:
        raise Unfit("has no round")
    return value


MECHANISM = {  # `describe`d
    "kind": text(), "records": whole(1, 10**12), "sampling_rate": real(0, 1, above=True), "capacity": whole(1, 10**12),
    "noise_multiplier": real(0, accounting.MOST_NOISE),
}  # fmt: skip
LATER = {
    "count_noise": real(0, 10**12),
    "bands": whole(1, accounting.MOST_STEPS),
}  # that the first version did not write
SEALED = LINK | {"entry": one_of("begin", "commit", "evaluate", "end")}
DISPATCH = SEALED | {"rounds": _rounds, "attempt": whole(0, 10**9)}
GUARANTEE = {"trust": text(), "delta": real(0, 1, above=True), "release": text(), "config": hexadecimal()}
NONCE = {"nonce": hexadecimal()}
SCHEMAS = {
    "begin": record(
        DISPATCH | {"local_steps": whole(1, accounting.MOST_STEPS), "clients": list_of(record(MECHANISM, LATER), 10**6, 1),
                    "inputs": mapping_of(hexadecimal())},
        GUARANTEE | NONCE | {"steps": list_of(_steps), "request": hexadecimal()},
    ),
    "commit": record(DISPATCH),
    "evaluate": record(
        SEALED | GUARANTEE | {"round": _steps, "attempt": whole(0, 10**9), "inputs": mapping_of(hexadecimal()),
                              "noise_multiplier": MECHANISM["noise_multiplier"]},
        NONCE,
    ),
    "end": record(SEALED, {"round": _steps}),
}  # fmt: skip
KINDS = {"truncated_poisson_gaussian": accounting.Mechanism}  # kind -> a frozen dataclass that accounting composes


def describe(mechanism):
    """A mechanism as a JSON object, {"kind": its kind, **its fields}: all of it public."""
    kind = next(kind for kind, mechanism_type in KINDS.items() if type(mechanism) is mechanism_type)
    return {"kind": kind, **dataclasses.asdict(mechanism)}


def rebuild(description):
    """The mechanism of a `describe`d object; InputError for one that this version does not know."""
    fields = {name: value for name, value in description.items() if name != "kind"}
    try:
        return KINDS[description["kind"]](**fields)
    except (KeyError, TypeError):
        raise InputError(
            "the ledger speaks of a mechanism that this version does not know: use the version that wrote it."
        ) from None


def steps_of(entry):
    """How many steps a begin entry charges each client for: all its rounds', or by "steps" those of the rounds that it is in."""
    rounds = entry["rounds"][1] - entry["rounds"][0]
    return entry.get("steps", [rounds * entry["local_steps"]] * len(entry["clients"]))


def follows(entry, before):
    """Whether the begin entry `entry` goes on where `before` ended: then both are of one block, and noise that is correlated over
    rounds goes on too. One that does not, after a lost dispatch say, begins a block, whose noise is new."""
    return entry["rounds"][0] == before["rounds"][1] and entry["clients"] == before["clients"]


def charges(entries):
    """What each of the begin entries `entries` charges each client: a list of steps, one list an entry. The last entry of a block
    that another followed charges whole turns of the parts (`accounting.Mechanism.bands`), so that of all steps together
    `Mechanism.charged` makes the sum of what it makes of each block."""
    made, block = [], None
    for entry, following in itertools.zip_longest(entries, entries[1:]):
        steps = steps_of(entry)
        block = steps if block is None else list(map(operator.add, block, steps))
        if following is not None and not follows(following, entry):
            lacking = [-count % client.get("bands", 1) for count, client in zip(block, entry["clients"], strict=True)]
            steps, block = list(map(operator.add, steps, lacking)), None
        made.append(steps)
    return made


def _entry(value):
    """The check of an entry of any kind."""
    kind = value.get("entry") if type(value) is dict else None
    checked = (SCHEMAS[kind] if type(kind) is str and kind in SCHEMAS else record(SEALED))(value)
    if len(checked.get("steps", checked.get("clients", ()))) != len(checked.get("clients", ())):
        raise Unfit("steps are not one for each client")
    return checked


def _dispatch(entry):
    """The rounds and the attempt of an entry: no two begin entries have the same."""
    return (*entry["rounds"], entry["attempt"])


class _Begun:
    """The rounds that were begun under each attempt number, the dispatches that wait for their commit, and the evaluations."""

    def __init__(self):
        self._of, self.open, self.clients, self._evaluated = {}, set(), None, set()

    def begin(self, entry):
        """What is wrong with a begin entry, in words, or None."""
        (first, end), spans = entry["rounds"], self._of.setdefault(entry["attempt"], [])
        place = bisect.bisect(spans, (first, end))
        if (place and spans[place - 1][1] > first) or (place < len(spans) and spans[place][0] < end):
            return "begins rounds whose keys an earlier entry used"
        spans.insert(place, (first, end))
        self.open.add(_dispatch(entry))
        if self.clients is not None and len(entry["clients"]) != len(self.clients):
            return "has another number of clients than the one before"
        if entry["clients"] == self.clients:
            entry["clients"] = self.clients  # held once
        self.clients = entry["clients"]
        return None

    def evaluate(self, entry):
        """What is wrong with an evaluate entry, in words, or None."""
        place = entry["round"], entry["attempt"]
        if place in self._evaluated:
            return "evaluates a round under keys that an earlier entry used"
        self._evaluated.add(place)
        return None

    def commit(self, entry):
        """What is wrong with a commit entry, in words, or None."""
        if _dispatch(entry) not in self.open:
            return "commits what was not begun"
        self.open.discard(_dispatch(entry))
        return None


class Ledger(Chain):
    """The entries of one file, read at the start and appended to durably."""

    entry = staticmethod(_entry)

    def __init__(self, path, mend=True):
        super().__init__(path, mend)
        begun, ended = _Begun(), False
        follows = {"begin": begun.begin, "commit": begun.commit, "evaluate": begun.evaluate, "end": lambda _: None}
        for number, entry in enumerate(self.entries, 1):
            wrong = "stands after the end of the run" if ended else follows[entry["entry"]](entry)
            if wrong:
                raise InputError(f"{self.path} does not hold: entry {number} {wrong}; {ADVICE}")
            ended = entry["entry"] == "end"
        self._committed = {_dispatch(entry) for entry in self._of("commit")}

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

    @property
    def evaluated(self):
        """The evaluate entries, oldest first."""
        return self._of("evaluate")

    @property
    def charged(self):
        """The entries that charge someone, oldest first."""
        return [entry for entry in self.entries if entry["entry"] in ("begin", "evaluate")]

    def block(self):
        """The begin entries of the newest block (`follows`), oldest first."""
        begun, first = self.begun, len(self.begun)
        while first and (first == len(begun) or follows(begun[first], begun[first - 1])):
            first -= 1
        return begun[first:]

    def committed(self, entry):
        """Whether a commit followed the begin entry `entry`."""
        return _dispatch(entry) in self._committed

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
        self._committed.add((*rounds, attempt))

    def evaluate(self, number, attempt, noise_multiplier, inputs, **more):
        """Charge an evaluation after round `number` before it is computed; `inputs` and `more` as for `begin`."""
        self.append(
            entry="evaluate", round=number, attempt=attempt, noise_multiplier=noise_multiplier, inputs=inputs, **more
        )

    def charged_rounds(self):
        """How many rounds have been paid for, repeated attempts included."""
        return sum(entry["rounds"][1] - entry["rounds"][0] for entry in self.begun)

    def charged_steps(self, clients, planned=()):
        """How many steps each of `clients` clients has paid for, repeated attempts included, and by begin entries `planned`."""
        return [sum(column) for column in zip([0] * clients, *charges([*self.begun, *planned]), strict=True)]

    def epsilons(self, delta, planned=()):
        """Each client's epsilon at `delta`, recomputed from every begin entry, and from `planned` ones: the composition of all
        their steps."""
        steps = {}
        entries = [*self.begun, *planned]
        for entry, charged in zip(entries, charges(entries), strict=True):
            for client, description in enumerate(entry["clients"]):
                key = client, rebuild(description)
                steps[key] = steps.get(key, 0) + charged[client]
        spent = {}
        for (client, mechanism), count in steps.items():
            spent.setdefault(client, []).append((mechanism, count))
        return [accounting.composed(tuple(spent[client]), delta) for client in sorted(spent)]

    def test_epsilon(self, delta):
        """What a record that never trains has paid at `delta`, by all evaluate entries; 0 where there are none."""
        return accounting.full_epsilon([entry["noise_multiplier"] for entry in self.evaluated], delta)


class InMemoryLedger(Ledger):
    """The ledger of a run that nothing is kept of: the same entries and checks, in no file."""

    def __init__(self):
        super().__init__("the ledger in memory")

    def _head_file(self):
        return {"entries": 0, "head": chain.GENESIS}

    def _stored(self):
        return self._head_file(), b""

    def seal_with(self, secret):
        """Seal what is appended from now on."""
        self._secret = secret

    def _write(self, line):
        """Nothing is written."""

    def promise(self):
        """Nothing is promised."""
