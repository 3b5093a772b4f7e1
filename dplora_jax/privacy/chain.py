"""A file of JSON lines that shows what was done to it: each line carries the SHA-256 of the line before it, and a small head file
beside it knows how many lines were promised and the last one's hash.

A line is promised once `append` has returned. What a crash can leave, a line torn or one line more than promised, is mended; any
line edited, moved or removed, the last promised one included, is an InputError. With a secret, lines and head file carry an
HMAC too (a seal): while the secret exists, nobody else can write a chain that passes for the run's own.
"""

import hashlib
import hmac
import io
import os
import pathlib

from dplora_jax import json_files
from dplora_jax.errors import InputError
from dplora_jax.files import to_json
from dplora_jax.privacy import secrets

GENESIS = hashlib.sha256(b"dplora_jax privacy ledger, version 1").hexdigest()  # what the first line follows
ADVICE = "restore it, or start a new `workdir`."
MOST_ENTRIES = 1 << 18
ANCHOR = json_files.record({"entries": json_files.whole(0, MOST_ENTRIES), "head": json_files.hexadecimal()})
LINK = {"previous": json_files.hexadecimal()}  # what each line has


def _hash(line):
    return hashlib.sha256(line).hexdigest()


def _seal(secret, value):
    """The HMAC of a JSON object without its own "seal"."""
    bare = {key: item for key, item in value.items() if key != "seal"}
    return secrets.digest(secret, "seal", to_json(bare)).hex()


def _sealed(secret, value):
    return value if secret is None else value | {"seal": _seal(secret, value)}


def _is_object(line):
    try:
        return type(json_files.parse(line, json_files.anything)) is dict
    except json_files.Unfit:
        return False


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
    an unpromised rest lies, or lay, behind them. With `mend` that rest is cut off; without, nothing is written. Each line is held
    against the schema `entry` (`json_files`)."""

    entry = staticmethod(json_files.record(LINK))

    def __init__(self, path, mend=True):
        self.path, self.head_path = pathlib.Path(path), pathlib.Path(path).with_suffix(".head")
        self._secret = None
        promised, data = self._stored()
        end, count, lines = data.rfind(b"\n") + 1, promised["entries"], data.count(b"\n")
        if lines > count + 1:
            raise InputError(
                f"{self.path} has {lines} entries, and {self.head_path.name} beside it knows of {count}: "
                f"that file is gone or old; {ADVICE}"
            )
        if lines == count + 1:
            last = data.rfind(b"\n", 0, end - 1) + 1
            if not _is_object(data[last:end]):  # a block of garbage that ends as a line does
                end = last
        self.torn = end < len(data)
        self.entries, self.heads = self._linked(io.BytesIO(data[:end]))
        self.check(promised, self.head_path.name)
        if mend and self.torn:
            with open(self.path, "r+b") as file:
                file.truncate(end)
                os.fsync(file.fileno())
        self._promised = count

    def _stored(self):
        """(the head file's object, the bytes of the chain), read while neither changed."""
        while True:
            before = self._head_file()
            try:
                data = json_files.read(self.path)
            except FileNotFoundError:
                data = b""
            except json_files.Unfit as error:
                raise InputError(f"{self.path} is damaged: {error}; {ADVICE}") from None
            if self._head_file() == before:
                return before, data

    def _head_file(self):
        try:
            return json_files.load(self.head_path, ANCHOR)
        except FileNotFoundError:
            return {"entries": 0, "head": GENESIS}
        except json_files.Unfit as error:
            raise InputError(f"{self.head_path} is damaged: {error}; {ADVICE}") from None

    def _linked(self, lines):
        """(entries, heads) of the lines, each of which must follow the one before."""
        entries, heads = [], [GENESIS]
        for number, line in enumerate(lines, 1):
            line = line[:-1]
            try:
                entry = json_files.parse(line, self.entry)
            except json_files.Unfit as error:
                raise InputError(
                    f"{self.path} is damaged: line {number} is not an entry that this version knows: {error}; {ADVICE}"
                ) from None
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
        try:
            count = ANCHOR(anchor)["entries"]
        except json_files.Unfit as error:
            raise InputError(f"{name} is damaged: what it knows of {self.path} {error}; {ADVICE}") from None
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
            seal = str(value.get("seal")).encode(errors="replace")  # whatever text stands there
            if not hmac.compare_digest(seal, _seal(secret, value).encode()):
                raise InputError(
                    f"{name} was not written by this run: its seal does not fit the run's secrets; {ADVICE}"
                )
        self._secret = secret

    def append(self, **entry):
        """Add one line and make it durable, then promise it in the head file, durably too, before returning."""
        self.promise()
        value = _sealed(self._secret, {"previous": self.heads[-1], **entry})
        line = to_json(value)
        self._write(line)
        self.entries.append(value)
        self.heads.append(_hash(line.encode()))
        self.promise()

    def _write(self, line):
        """Add `line` to the file, durably."""
        size = self.path.stat().st_size if self.entries else 0
        full = len(self.entries) >= MOST_ENTRIES
        if full or len(line) > json_files.MOST_TEXT or size + len(line) >= json_files.MOST_BYTES:
            raise InputError(
                f"{self.path} would outgrow what is read of it: raise `dispatch_rounds`, in a new `workdir`."
            )
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def promise(self):
        """Let the head file know of every line, one whose promise a crash forestalled included: before what it announces runs."""
        if self._promised == len(self.entries):
            return
        replace_durably(self.head_path, to_json(_sealed(self._secret, self.anchor)) + "\n")
        self._promised = len(self.entries)
