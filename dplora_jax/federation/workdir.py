"""A run's working directory: its lock, and what an earlier start in it allows a later one to change."""

import contextlib
import fcntl
import pathlib
import shutil

from dplora_jax import errors
from dplora_jax.config import RESULT, RunConfig, deciding, to_flat
from dplora_jax.errors import InputError
from dplora_jax.federation import run_files
from dplora_jax.files import plain


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


def stored_config(folder, config):
    """The config.json of an earlier start here -> Stored, or None; InputError where flags that enter the training differ."""
    if not (folder / "config.json").exists():
        return None
    stored = run_files.read_config(folder)
    now, began = plain(to_flat(config)), with_defaults(stored.document)
    differ = [f"`{name}`" for name in deciding(RESULT) if name in now and now[name] != began[name]]
    if differ:
        raise InputError(
            f"{folder} belongs to a run with another {', '.join(differ)}: use its flags again, or another `workdir`."
        )
    return stored


def charged_config(folder, stored, ledger):
    """The JSON object of `stored` where its run was charged already, by it and no other; else None: all that it says is then made
    anew, from flags and records. What an earlier start saved by it before the first round goes."""
    if ledger.begun and stored is None:
        raise InputError(
            f"{folder}/config.json is gone, and rounds were charged by it: restore it, or start a new `workdir`."
        )
    if ledger.begun and ledger.begun[-1].get("config", stored.digest) != stored.digest:
        raise InputError(
            f"{folder}/config.json is not the one that the ledger was charged by: restore it, or start a new `workdir`."
        )
    if ledger.begun or ledger.ended:
        return stored and stored.document
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return None


def with_defaults(document):
    """`document`, what a config.json says, with the flags that a later version added: they were at their defaults."""
    return plain(to_flat(RunConfig())) | document
