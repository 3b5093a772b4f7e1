"""The files of a run's working directory: its lock, its configuration, its metrics."""

import contextlib
import dataclasses
import fcntl
import hashlib
import pathlib
import shutil

from dplora_jax import errors
from dplora_jax.config import FREE_ON_RESUME, RunConfig, to_flat
from dplora_jax.errors import InputError
from dplora_jax.files import plain, read_json, to_json
from dplora_jax.privacy.chain import replace_durably


@contextlib.contextmanager
def locked(workdir):
    """Hold the working directory for this process; InputError when another holds it."""
    workdir = pathlib.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / ".lock", "w")  # noqa: SIM115 - held until the process ends
    except OSError as error:
        raise errors.storage(error) or InputError(f"workdir={workdir} cannot be written ({error.strerror}).") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"workdir={workdir} is in use by another run.") from None
        yield workdir


def stored_config(workdir, config):
    """The `config.json` of an earlier start here, or None; InputError where flags that enter the training differ."""
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        stored = read_json(path)
        stored["federation"]["clients"]
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path} is damaged: restore it, or start a new `workdir`.") from None
    now, began = plain(to_flat(config)), with_defaults(stored)
    differ = [f"{name}" for name in now if name not in FREE_ON_RESUME and now[name] != began[name]]
    if differ:
        raise InputError(
            f"{workdir} belongs to a run with another {', '.join(differ)}: use its flags again, or another `workdir`."
        )
    return stored


def charged_config(workdir, stored, ledger):
    """`stored` where its run was charged already, by it and no other; else None: all that it says is then made anew, from flags
    and records. What an earlier start saved by it before the first round goes."""
    if ledger.begun and stored is None:
        raise InputError(
            f"{workdir}/config.json is gone, and rounds were charged by it: restore it, or start a new `workdir`."
        )
    if ledger.begun and ledger.begun[-1].get("config", told := digest_of(stored)) != told:
        raise InputError(
            f"{workdir}/config.json is not the one that the ledger was charged by: restore it, or start a new `workdir`."
        )
    if ledger.begun or ledger.ended:
        return stored
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    return None


def digest(workdir):
    """SHA-256 (hex) of what config.json says, however it is laid out: each begin entry of the ledger has it."""
    try:
        stored = read_json(workdir / "config.json")
    except InputError:
        raise InputError(f"{workdir}/config.json is gone or damaged: restore it, or start a new `workdir`.") from None
    return digest_of(stored)


def digest_of(stored):
    """`digest` of config.json's JSON object."""
    return hashlib.sha256(to_json(stored, sort_keys=True).encode()).hexdigest()


def with_defaults(stored):
    """`stored`, what a config.json says, with the flags that a later version added: they were at their defaults."""
    return plain(dataclasses.asdict(RunConfig())) | stored


def write_config(workdir, config, federation):
    """Write `config.json`: every flag as resolved, and what the run made of them under "federation"."""
    document = to_flat(config) | {"federation": federation}
    replace_durably(workdir / "config.json", to_json(document, indent=2) + "\n")


def write_metrics(workdir, lines):
    """Write `metrics.jsonl` anew: a line a round."""
    replace_durably(workdir / "metrics.jsonl", "".join(to_json(line) + "\n" for line in lines))
