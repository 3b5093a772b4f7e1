"""The write-ahead ledger: one entry a dispatch, durable before it runs, committed after its checkpoint is.

A JSON line is {"entry": "begin", "rounds": [a, b], "attempt": n, "clients": [...], ...}, then {"entry": "commit", ...} of the
same rounds and attempt, and at last {"entry": "end"}. epsilon is recomputed from the begin entries alone: what was begun is
paid for, whether or not it came back.
"""

import dataclasses
import json
import os
import pathlib

from dplora_jax.errors import InputError
from dplora_jax.privacy import accounting, secrets

KEYS = {
    "begin": ("rounds", "attempt", "clients", "local_steps", "fingerprint"),
    "commit": ("rounds", "attempt"),
    "end": (),
}


def _is_entry(entry):
    return isinstance(entry, dict) and entry.get("entry") in KEYS and all(key in entry for key in KEYS[entry["entry"]])


class Ledger:
    """The entries of one file, read at the start and appended to durably. A torn last line (a crash while it was written,
    before anything that it announces ran) is cut off; any other malformed line is an InputError."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        try:
            self.entries = [json.loads(line) for line in whole.splitlines()]
            damaged = not all(map(_is_entry, self.entries))
        except ValueError:  # no JSON, or no UTF-8
            damaged = True
        if damaged:
            raise InputError(
                f"{self.path} is damaged: a line before the last is no entry; restore it or start a new --workdir."
            )

    def append(self, **entry):
        """Add one line and make it durable before returning."""
        new = not self.path.exists()
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if new:
            secrets.sync_directory(self.path.parent)
        self.entries.append(entry)

    def _of(self, kind):
        return [entry for entry in self.entries if entry["entry"] == kind]

    @property
    def ended(self):
        """Whether the run has come to its end."""
        return bool(self._of("end"))

    @property
    def last_begun(self):
        """The newest begin entry, or None."""
        return (self._of("begin") or [None])[-1]

    def open_entry(self):
        """The begin entry that no commit followed, or None."""
        begun = self._of("begin")
        done = {(*entry["rounds"], entry["attempt"]) for entry in self._of("commit")}
        last = begun[-1] if begun else None
        return None if last is None or (*last["rounds"], last["attempt"]) in done else last

    def next_attempt(self, rounds):
        """An attempt number whose keys no begun dispatch has used for any of `rounds` [a, b)."""
        used = [e["attempt"] for e in self._of("begin") if e["rounds"][0] < rounds[1] and rounds[0] < e["rounds"][1]]
        return max(used, default=-1) + 1

    def begin(self, rounds, attempt, mechanisms, local_steps, fingerprint, **more):
        """Charge a dispatch before it runs. `fingerprint` (hex) covers everything that feeds the mechanism; `more` is written
        along (JSON values)."""
        clients = [list(dataclasses.astuple(m)) for m in mechanisms]
        self.append(
            entry="begin",
            rounds=list(rounds),
            attempt=attempt,
            clients=clients,
            local_steps=local_steps,
            fingerprint=fingerprint,
            **more,
        )

    def commit(self, rounds, attempt):
        """Say that the dispatch's checkpoint is durable."""
        self.append(entry="commit", rounds=list(rounds), attempt=attempt)

    def charged_rounds(self):
        """How many rounds have been paid for, repeated attempts included."""
        return sum(entry["rounds"][1] - entry["rounds"][0] for entry in self._of("begin"))

    def epsilons(self, delta):
        """Each client's epsilon at `delta`, recomputed from every begin entry: the composition of all their steps."""
        steps = {}
        for entry in self._of("begin"):
            for client, values in enumerate(entry["clients"]):
                key = client, accounting.Mechanism(*values)
                steps[key] = steps.get(key, 0) + (entry["rounds"][1] - entry["rounds"][0]) * entry["local_steps"]
        spent = {}
        for (client, mechanism), count in steps.items():
            spent.setdefault(client, []).append((mechanism, count))
        return [accounting.composed(tuple(spent[client]), delta) for client in sorted(spent)]
