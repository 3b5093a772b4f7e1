"""Files: of those that others made, which one is opened, its JSON within bounds, its digest; of our own, JSON that any parser
reads."""

import hashlib
import json
import math
import os
import pathlib
import re

from dplora_jax import json_files
from dplora_jax.errors import InputError, storage, unreadable

MOST_BYTES = 64 << 20  # of a file that is read whole: the largest tokenizer.json in use has half of it
BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # what the hub's cache calls a file's bytes


def is_plain(name):
    """Whether `name` names something that lies directly in a folder: no path, no hidden file, nothing unprintable."""
    return isinstance(name, str) and name.isprintable() and not re.search(r"^\.|[/\\]|^$", name) and len(name) < 256


def find(folder, *names):
    """The file `names[-1]` of `folder`, in its subfolders `names[:-1]`; None where there is no such file.

    A folder's files come from whoever made it, and so do the names in them: each is a plain name, and what it leads to lies in
    the folder. The folder itself may be a link. Of links below it, only the hub's cache's own are followed. Raises InputError.
    """
    path = pathlib.Path(folder, *map(str, names))
    for name in names:
        if not is_plain(name):
            raise InputError(f"{folder} names a file {name!r}: only a plain name of a file in that folder is read.")
    try:
        expected = pathlib.Path(os.path.realpath(folder), *names)
        real = expected.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a folder that may not be entered
        raise storage(error) or InputError(
            f"{path} cannot be read ({type(error).__name__}): put the file itself there."
        ) from None
    if real != expected and not _is_blob(expected.parent, real):
        raise InputError(
            f"{path} is a link that leads out of its folder, and is not followed: put the file itself there, or link the whole "
            "folder."
        )
    if not real.is_file():  # a pipe would be waited for, a device never ends
        raise InputError(f"{path} is not a file: put the file itself there.")
    return path


def inside(folder, *names):
    """The file that `find` finds; InputError where there is none."""
    path = find(folder, *names)
    if path is None:
        raise InputError(f"{pathlib.Path(folder, *names)} does not exist: the folder needs it.")
    return path


def _is_blob(folder, real):
    """Whether `real` is the bytes of a file of `folder`, a snapshot in the cache of huggingface_hub:
    models--NAME/snapshots/REVISION/FILE links to models--NAME/blobs/HASH, which may link to blobs/HA/HASH beside models--NAME."""
    snapshots = next((place for place in folder.parents if place.name == "snapshots"), None)
    if snapshots is None or not snapshots.parent.name.startswith("models--") or not BLOB.fullmatch(real.name):
        return False
    repository = snapshots.parent
    return real.parent in (repository / "blobs", repository.parent / "blobs" / real.name[:2])


def read_bytes(path):
    """The bytes of a file that `find` would find in its folder, at most MOST_BYTES of them; InputError."""
    path = inside(path.parent, path.name)
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise unreadable(error, f"{path} cannot be read ({error.strerror}).") from None
    if len(content) > MOST_BYTES:
        raise InputError(f"{path} has more than {MOST_BYTES >> 20} MiB, which no file of its kind has.")
    return content


def read_json(path, kind=dict):
    """A JSON file that holds a `kind`, read within bounds of size and depth; InputError where it is missing or malformed."""
    return parse_json(read_bytes(path), path, kind)


def parse_json(content, path, kind=dict):
    """The JSON in the bytes `content` of `path`, which is named in the errors; raises InputError as `read_json` does."""
    try:
        document = json_files.parse(content, json_files.anything, MOST_BYTES)
    except json_files.Unfit as error:
        raise InputError(f"{path} is not valid JSON for this program: {error}.") from None
    if not isinstance(document, kind):
        raise InputError(f"{path} holds a JSON {type(document).__name__}, not a {kind.__name__}.")
    return document


def sha256(path):
    """The SHA-256 of a file's bytes, in hex. A file that did not change is read once by a process."""
    status = os.stat(path)
    key = os.path.realpath(path), status.st_ino, status.st_size, status.st_mtime_ns
    if key not in _DIGESTS:
        with open(path, "rb") as file:
            _DIGESTS[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _DIGESTS[key]


_DIGESTS = {}


def plain(value):
    """`value` with "inf", "-inf" or "nan", which Python's `float` reads back, for each number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def number(value):
    """The float of a JSON value that `plain` may have written; None for what is not a number."""
    if isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def to_json(value, **options):
    """`value` as strict JSON text; `options` are json.dumps's.

    >>> to_json({"epsilon": float("inf"), "loss": [float("nan"), 0.5]})
    '{"epsilon": "inf", "loss": ["nan", 0.5]}'
    """
    return json.dumps(plain(value), allow_nan=False, **options)
