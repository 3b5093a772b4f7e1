"""Each client's secret (and the server's, where it has one), and what derives from it.

A secret is 256 bits from the operating system. A key is HMAC-SHA256(secret, purpose, round, attempt): 32 bytes, read as the
four threefry keys of `noise.gaussian`. Steps and leaves are folded in on the device; hardened noise
has keys of its own, step and leaf included (`host_noise.round_draws`).
"""

import hashlib
import hmac
import json
import os
import pathlib

import numpy as np

from dplora_jax import json_files
from dplora_jax.errors import InputError
from dplora_jax.files import to_json

PURPOSES = ("noise", "sampling")
FILE = "secrets.json"
SECRETS = json_files.list_of(json_files.hexadecimal(64, 64), 10**6)


def from_seed(seed, clients):
    """Secrets that anyone can derive from `seed`: for reproducible runs, which are not for release."""
    return [hashlib.sha256(f"seed {seed} client {k}".encode()).digest() for k in range(clients)]


def load_or_create(private, clients):
    """The clients' secrets (a list of 32 bytes) from `private`/secrets.json, made and made durable when there is none.

    `private` is created with mode 0700, the file with mode 0600.
    """
    private = pathlib.Path(private)
    private.mkdir(mode=0o700, parents=True, exist_ok=True)
    private.chmod(0o700)
    path = private / FILE
    if (held := load(private)) is not None:
        return held
    for unfinished in private.glob(f"{FILE}.*"):  # of a start that was killed here: nothing was derived from it
        unfinished.unlink()
    secrets = [os.urandom(32) for _ in range(clients)]
    draft = private / f"{FILE}.{os.getpid()}"
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(to_json([secret.hex() for secret in secrets]))
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    sync_directory(private)
    return secrets


def load(private):
    """The secrets in `private`, a list of 32 bytes; None where there are none, or `destroy` was killed on its way."""
    path = pathlib.Path(private) / FILE
    try:
        text = json_files.read(path)
        secrets = [] if not text or b"\0" in text else json_files.parse(text, SECRETS)
    except FileNotFoundError:
        return None
    except json_files.Unfit as error:
        raise InputError(f"{path} is damaged: {error}; restore it.") from None
    return [bytes.fromhex(secret) for secret in secrets] or None


def destroy(private):
    """Overwrite and remove the secrets, if they are there (a file system that keeps old blocks may still hold them)."""
    path = pathlib.Path(private) / FILE
    if not path.exists():
        return
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()
    sync_directory(path.parent)


def sync_directory(path):
    """Make a directory's entries durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(secret, *parts):
    """HMAC-SHA256 under `secret` of the parts, each told apart from its neighbours -> 32 bytes."""
    # Not `to_json`: these bytes decide keys, and must stay what they are in every version.
    return hmac.new(secret, json.dumps(parts).encode(), hashlib.sha256).digest()


def joins(secrets, rounds, attempt, rate):
    """Who takes part in which round: float32 [rounds, K] of 0 or 1. Each client does in each round independently, with
    probability `rate` (rounded down to 2^-64), by its own secret."""
    below = int(rate * 2**64)
    draw = lambda s, r: int.from_bytes(digest(s, "joins", int(r), int(attempt))[:8], "big")  # noqa: E731
    drawn = [[draw(s, r) < below for s in secrets] for r in rounds]
    return np.array(drawn, np.float32).reshape(len(rounds), len(secrets))


def round_keys(secrets, rounds, attempt, clients=None, rate=None):
    """The keys of a dispatch: {purpose: uint32 [rounds, K, 4, 2]} for the round numbers in `rounds`.

    The first `clients` secrets (None: all) are the clients'; where there is one more, it is the server's, and "server"
    [rounds, 4, 2] are its noise keys. With a `rate` there is "joins" too.
    """

    clients_secrets, server = secrets[:clients], secrets[len(secrets) if clients is None else clients :]
    keys = {purpose: keys_of(clients_secrets, purpose, rounds, attempt) for purpose in PURPOSES}
    if server:
        keys["server"] = keys_of(server[:1], "noise", rounds, attempt)[:, 0]
    return keys if rate is None else keys | {"joins": joins(clients_secrets, rounds, attempt, rate)}


def keys_of(secrets, purpose, rounds, attempt):
    """Each secret's keys for one `purpose`: uint32 [rounds, K, 4, 2]."""
    keys = [digest(secret, purpose, int(number), int(attempt)) for number in rounds for secret in secrets]
    return np.frombuffer(b"".join(keys), np.uint32).reshape(len(rounds), len(secrets), 4, 2)
