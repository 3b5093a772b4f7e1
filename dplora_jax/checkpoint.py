"""What a run needs to go on after it was killed: the state of the rounds and the lines it has shown, saved by orbax."""

import logging
import os
import pathlib
import re

from dplora_jax import errors, json_files
from dplora_jax.errors import InputError
from dplora_jax.files import plain
from dplora_jax.privacy import chain, secrets

NOTES = json_files.record({"ledger": chain.ANCHOR}, rest=json_files.anything)


def anchors(directory):
    """What each whole checkpoint of `directory` knows of the ledger: [(the checkpoint's name, Chain.anchor)], oldest first.

    Read from the notes, which orbax keeps as plain JSON and which become visible in one step with the rest; needs no JAX.
    """
    anchors_by_name = []
    whole = re.compile("[0-9]{1,9}")  # others are being written
    folders = [path for path in pathlib.Path(directory).glob("[0-9]*") if whole.fullmatch(path.name)]
    for folder in sorted(folders, key=lambda path: int(path.name)):
        try:
            anchor = json_files.load(folder / "notes" / "metadata", NOTES)["ledger"]
        except (FileNotFoundError, json_files.Unfit):
            # A running program keeps two and has just removed it, or was killed while it removed it: a newer one is whole.
            if not folder.exists() or int(folder.name) < max(int(path.name) for path in folders):
                continue
            raise InputError(f"{folder} is damaged: restore it, or start a new `workdir`.") from None
        anchors_by_name.append((f"checkpoint {folder.name}", anchor))
    return anchors_by_name


def _sync_tree(directory):
    """Make every file and directory below `directory` durable."""
    for folder, _, files in os.walk(directory):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        secrets.sync_directory(folder)


def _leave_out_orbaxs_own(record):
    """Of absl's log, not what orbax writes there: the traceback, once for each of its threads, of an error that it raises too."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


class Checkpoints:
    """The checkpoints of one directory, a step a round; the last two kept. All processes of a run save and restore together, in
    one directory that all see; the notes are those of process 0.

    Nothing is saved in the background: of a process whose disk is full there, the others would wait for what never comes."""

    def __init__(self, directory):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").addFilter(_leave_out_orbaxs_own)
        self._directory, self._args = pathlib.Path(directory).absolute(), ocp.args
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, number, state, notes):
        """Save `state` (a pytree of arrays) and `notes` (JSON) as of round `number`; `wait` makes it durable.
        `notes["ledger"]` is the anchor that `anchors` reads."""
        parts = self._args.Composite(state=self._args.StandardSave(state), notes=self._args.JsonSave(plain(notes)))
        self._manager.save(number, args=parts)

    def wait(self, meet=lambda: None):
        """Return when everything saved so far is durable, which orbax leaves to the system.

        Where several processes save together, `meet` returns when all have called it: before, none knows of all the files,
        and after, each has made durable what it wrote."""
        meet()
        number = self._manager.latest_step()
        if number is not None:
            _sync_tree(self._directory / str(number))
            secrets.sync_directory(self._directory)
        meet()

    def restore(self, like):
        """The newest whole checkpoint as (round, state, notes), or None; `like` gives shapes, dtypes and shardings."""
        import jax

        number = self._manager.latest_step()
        if number is None:
            return None
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        parts = self._args.Composite(state=self._args.StandardRestore(abstract), notes=self._args.JsonRestore())
        try:
            restored = self._manager.restore(number, args=parts)
        except Exception as error:  # orbax and tensorstore have many; all mean that it cannot be read
            raise errors.storage(error) or InputError(
                f"checkpoint {self._directory / str(number)} cannot be read ({type(error).__name__}): remove it, and the run "
                "goes on from the one before."
            ) from None
        return number, restored["state"], restored["notes"]

    def close(self):
        """Let go of the directory."""
        self._manager.close()
