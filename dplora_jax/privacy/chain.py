"""A file of JSON lines that shows what was done to it: each line carries the SHA-256 of the line before it, and a small head file
beside it knows how many lines were promised and the last one's hash.

A line is promised once `append` has returned. What a crash can leave, a line torn or one line more than promised, is mended; any
line edited, moved or removed, the last promised one included, is an InputError. With a secret, lines and head file carry an
HMAC too (a seal): while the secret exists, nobody else can write a chain that passes for the run's own.
"""

import hashlib
import hmac
import json
import os
import pathlib

from dplora_jax.errors import InputError
from dplora_jax.files import read_if_there, to_json
from dplora_jax.privacy import secrets

GENESIS = hashlib.sha256(b"dplora_jax privacy ledger, version 1").hexdigest()  # what the first line follows
ADVICE = "restore it, or start a new --workdir."


def _hash(line):
    return hashlib.sha256(line).hexdigest()


def _seal(secret, value):
    """The HMAC of a JSON object without its own "seal"."""
    bare = {key: item for key, item in value.items() if key != "seal"}
    return secrets.digest(secret, "seal", to_json(bare)).hex()


def _sealed(secret, value):
    return value if secret is None else value | {"seal": _seal(secret, value)}


def _json_object(line):
    """The JSON object of a line of bytes, or None."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or absurdly deep
        return None
    return value if isinstance(value, dict) else None


def _is_count(value):
    return type(value) is int and value >= 0


def replace_durably(path, content, mode=0o666):
    """Replace the file at `path` by `content` (text or bytes) as one step, durably, its directory's entries included. The new
    file has `mode`, less what the process's umask takes, before anything is in it."""
    draft = path.with_name(f"{path.name}.draft")
    draft.unlink(missing_ok=True)  # of a start that was killed: it would keep its own mode
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    secrets.sync_directory(path.parent)


class Chain:
    """The lines of one file. `entries` holds their objects, `heads[i]` the hash of what line i follows, and `torn` says whether
    an unpromised rest lies, or lay, behind them. With `mend` that rest is cut off; without, nothing is written."""

    def __init__(self, path, mend=True):
        self.path, self.head_path = pathlib.Path(path), pathlib.Path(path).with_suffix(".head")
        self._secret = None
        promised, data = self._stored()
        end = data.rfind(b"\n") + 1
        lines = data[:end].split(b"\n")[:-1]
        count = promised["entries"]
        if len(lines) == count + 1 and _json_object(lines[-1]) is None:  # a block of garbage that ends as a line does
            end -= len(lines.pop()) + 1
        self.torn = end < len(data)
        self.entries, self.heads = self._linked(lines)
        self.check(promised, self.head_path.name)
        if len(lines) > count + 1:
            raise InputError(
                f"{self.path} has {len(lines)} entries, and {self.head_path.name} beside it knows of {count}: "
                f"that file is gone or old; {ADVICE}"
            )
        if mend and self.torn:
            with open(self.path, "r+b") as file:
                file.truncate(end)
                os.fsync(file.fileno())
        self._promised = count

    def _stored(self):
        """(the head file's object, the bytes of the chain), read while neither changed."""
        while True:
            before = self._head_file()
            data = read_if_there(self.path) or b""
            if self._head_file() == before:
                return before, data

    def _head_file(self):
        content = read_if_there(self.head_path)
        if content is None:
            return {"entries": 0, "head": GENESIS}
        head = _json_object(content)
        if head is None or not _is_count(head.get("entries")) or "head" not in head:
            raise InputError(f"{self.head_path} is damaged; {ADVICE}")
        return head

    def _linked(self, lines):
        """(entries, heads) of the lines, each of which must follow the one before."""
        entries, heads = [], [GENESIS]
        for number, line in enumerate(lines, 1):
            entry = _json_object(line)
            if entry is None or "previous" not in entry:
                raise InputError(f"{self.path} is damaged: line {number} is no entry; {ADVICE}")
            if entry["previous"] != heads[-1]:
                raise InputError(
                    f"{self.path} does not hold: entry {number} does not follow from the one before it, so one of them was "
                    f"edited, removed or moved; {ADVICE}"
                )
            entries.append(entry)
            heads.append(_hash(line))
        return entries, heads

    @property
    def anchor(self):
        """{"entries": how many, "head": the last one's hash}: whoever keeps it can tell whether these entries still stand."""
        return {"entries": len(self.entries), "head": self.heads[-1]}

    def head_of(self, entry):
        """The hash of an entry's line, which depends on every line before it."""
        return self.heads[1 + next(i for i, other in enumerate(self.entries) if other is entry)]

    def check(self, anchor, name):
        """InputError unless the entries that `anchor` speaks of, which is kept in `name`, are all here and unchanged."""
        count = anchor["entries"]
        if not _is_count(count):
            raise InputError(f"{name} is damaged: what it knows of {self.path} is no count of entries; {ADVICE}")
        if count > len(self.entries):
            raise InputError(
                f"{self.path} does not hold: it ends after entry {len(self.entries)}, and {name} knows of {count}, so its "
                f"end was removed; {ADVICE}"
            )
        if self.heads[count] != anchor["head"]:
            raise InputError(
                f"{self.path} does not hold: entry {count} is not the one that {name} knows, so it was edited; {ADVICE}"
            )

    def seal_with(self, secret):
        """Check that every entry and the head file carry the seal of `secret` (bytes), and seal what is appended from now on."""
        sealed = [(f"entry {number} of {self.path}", entry) for number, entry in enumerate(self.entries, 1)]
        if self.head_path.exists():
            sealed.append((str(self.head_path), self._head_file()))
        for name, value in sealed:
            shown = str(value.get("seal")).encode(errors="replace")  # whatever text stands there
            if not hmac.compare_digest(shown, _seal(secret, value).encode()):
                raise InputError(
                    f"{name} was not written by this run: its seal does not fit the run's secrets; {ADVICE}"
                )
        self._secret = secret

    def append(self, **entry):
        """Add one line and make it durable, then promise it in the head file, durably too, before returning."""
        self.promise()
        value = _sealed(self._secret, {"previous": self.heads[-1], **entry})
        line = to_json(value)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(value)
        self.heads.append(_hash(line.encode()))
        self.promise()

    def promise(self):
        """Let the head file know of every line, one whose promise a crash forestalled included: before what it announces runs."""
        if self._promised == len(self.entries):
            return
        replace_durably(self.head_path, to_json(_sealed(self._secret, self.anchor)) + "\n")
        self._promised = len(self.entries)
