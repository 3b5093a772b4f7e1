"""Where a run keeps what it must not lose: in a working directory, or nowhere (`InMemory`).

Both have one interface: the ledger, `stored` (an earlier start's config.json, or None), `finished`, `secrets`, `describe`,
`restore`, `save`, `release`, `keep_private` and `finish`. Of several processes only process 0 has the ledger and writes; all
save their parts of a checkpoint.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import sys

from dplora_jax import checkpoint, errors, private_files
from dplora_jax.config import to_flat
from dplora_jax.errors import InputError
from dplora_jax.federation import processes, resuming, trust, workdir_files
from dplora_jax.files import plain, to_json
from dplora_jax.privacy import ledger as ledgers
from dplora_jax.privacy import secrets
from dplora_jax.privacy.chain import replace_durably


class InMemory:
    """A run that is kept nowhere: when the process ends, nothing is left of it but what was saved by hand."""

    stored, finished, directory = None, False, None

    def __init__(self):
        self.ledger = ledgers.InMemoryLedger() if processes.primary() else None

    def secrets(self, parties, seed):
        """The secret of each of so many `parties`, 32 bytes; by a `seed`, anyone can derive them."""
        if seed is not None:
            return secrets.from_seed(seed, parties)
        if processes.count() > 1:
            raise InputError("several processes need a workdir, where process 0 leaves the secrets for the others.")
        return [os.urandom(32) for _ in range(parties)]

    def describe(self, config, description):
        """Keep what the run is (config.json)."""

    def config_digest(self):
        """What each begin entry says of config.json; None where there is none."""

    def restore(self, like):
        """(rounds done, state, notes) of the newest checkpoint, or None; `like` gives shapes, dtypes and shardings."""

    def save(self, done, state, notes):
        """Keep the state after `done` rounds; it is durable on return."""

    def release(self, lines):
        """Show the public metrics `lines`."""

    def keep_private(self, rows):
        """Append `rows` (dicts) of exact private statistics to what only their owner may read."""

    def finish(self):
        """Destroy the secrets: no round follows."""
        self.finished = True


class Workdir:
    """A run in a working directory (DESIGN: config.json, metrics.jsonl, privacy_ledger.jsonl, checkpoints/, private/)."""

    def __init__(self, directory, config, ledger, stored, finished):
        self.directory, self.config, self.ledger = directory, config, ledger
        self.stored, self.finished, self._checkpoints = stored, finished, None

    def check(self, config):
        """InputError where `config` decides another result than the one that the workdir was opened with."""
        if names := resuming.differing(config, plain(to_flat(self.config))):
            raise InputError(
                f"{self.directory} was opened for another {names} than the federation has: open it with its config."
            )

    def secrets(self, parties, seed):
        """The secret of each of so many `parties`: process 0 makes them where there are none, the others read its file."""
        private, created = self.directory / "private", None
        if processes.primary():
            if (
                not self.ledger.entries
            ):  # nothing ran under secrets that an earlier start left, or nothing tells what did
                secrets.destroy(private)
            created = secrets.load_or_create(private, parties) if seed is None else None
        processes.meet()
        if seed is not None:
            return secrets.from_seed(seed, parties)
        party_secrets = created or secrets.load(private)
        if party_secrets is None:
            raise InputError(
                f"{private} has no secrets that this process can read: `workdir` must be one shared folder for all."
            )
        return party_secrets

    def describe(self, config, description):
        """Write config.json, unless an earlier start, which was charged by it, did."""
        if processes.primary() and self.stored is None:
            workdir_files.write_config(self.directory, config, description)

    def config_digest(self):
        """SHA-256 of config.json, which each begin entry of the ledger has."""
        return workdir_files.read_config(self.directory).digest

    def restore(self, like):
        """(rounds done, state, notes) of the newest checkpoint, or None; `like` gives shapes, dtypes and shardings."""
        return self._opened().restore(like)

    def save(self, done, state, notes):
        """Write a checkpoint of the state after `done` rounds; it is durable on return."""
        self._opened().save(done, state, notes)
        self._opened().wait(processes.meet)

    def _opened(self):
        if self._checkpoints is None:
            self._checkpoints = checkpoint.Checkpoints(self.directory / "checkpoints")
        return self._checkpoints

    def release(self, lines):
        """Write metrics.jsonl anew: the public metrics `lines`."""
        workdir_files.write_metrics(self.directory, lines)

    def lines(self):
        """The public metrics of a finished run, a dict a round."""
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]

    def keep_private(self, rows):
        """Append `rows` (dicts) of exact private statistics to private/diagnostics.jsonl, labelled as what they are."""
        private = self.directory / "private"
        private.mkdir(mode=private_files.FOLDER_MODE, exist_ok=True)
        with open(os.open(private / "diagnostics.jsonl", os.O_RDWR | os.O_CREAT, private_files.MODE), "r+b") as file:
            # Behind the last whole line: a kill or a full disk may have cut one off.
            file.seek(file.read().rfind(b"\n") + 1)
            file.truncate()
            file.write("".join(to_json({"note": private_files.NOTE} | row) + "\n" for row in rows).encode())

    def finish(self):
        """Destroy the secrets: no round follows."""
        secrets.destroy(self.directory / "private")
        self.finished = True

    def close(self):
        """Finish pending saves."""
        if self._checkpoints is not None:
            self._checkpoints.close()


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


@contextlib.contextmanager
def open_workdir(directory, config):
    """The Workdir of `config` (settled) at `directory`, made where there is none, held for this process until the context ends.

    Raises InputError where another process holds it, where its run has other fields that decide the result, or where its ledger
    does not hold.
    """
    lock = locked(directory) if processes.primary() else contextlib.nullcontext(pathlib.Path(directory))
    with lock as folder:
        ledgers_here, seed = [], config.privacy.seed  # process 0's
        seeded = None if seed is None else secrets.from_seed(seed, trust.mode(config).parties(config))

        def look():
            stored = resuming.stored_config(folder, config)
            ledgers_here.append(_checked_ledger(folder, seeded))
            stored = resuming.charged_config(folder, stored, ledgers_here[0])
            return {"finished": ledgers_here[0].ended, "stored": stored}

        seen = processes.agree(look)
        opened = Workdir(folder, config, ledgers_here[0] if ledgers_here else None, seen["stored"], seen["finished"])
        try:
            yield opened
        finally:
            # Closing waits for the other processes, who may be gone.
            if processes.count() == 1 or sys.exc_info()[0] is None:
                opened.close()


class SiloWorkdir(Workdir):
    """A silo's working directory: its ledger, its secret and its state; silo.json says what they were begun with."""

    FILE = "silo.json"

    def describe(self, config, description):
        """Write silo.json, or hold it against what is there: InputError where a silo of another plan began here."""
        path, text = self.directory / self.FILE, to_json(to_flat(config) | description, indent=2) + "\n"
        if self.ledger.begun and (not path.exists() or path.read_text() != text):
            raise InputError(f"{self.directory} was begun with another plan: restore {path}, or give another workdir.")
        replace_durably(path, text)

    def config_digest(self):
        """SHA-256 of silo.json, which each begin entry of the ledger has."""
        return hashlib.sha256((self.directory / self.FILE).read_bytes()).hexdigest()


class SiteWorkdir(SiloWorkdir):
    """A site's working directory: config.json, as a run's, says what the whole federation is and which client is this one."""

    FILE = "config.json"

    def __init__(self, directory, config, ledger, stored, finished, federation):
        super().__init__(directory, config, ledger, stored, finished)
        self._federation = federation

    def describe(self, config, description):
        """Write config.json, or hold it against what is there: InputError where a site of another plan began here."""
        super().describe(config, {"federation": self._federation | {"member": description["client"]}})

    def config_digest(self):
        """As a run's."""
        return Workdir.config_digest(self)


@contextlib.contextmanager
def open_silo(directory, config, secret, description=None):
    """Where a silo of `config` (settled) is kept, held until the context ends: SiloWorkdir, or InMemory where `directory` is
    None. `secret` is the party's where a seed gives it, else None; with the `description` of its federation it is a SiteWorkdir.

    Raises InputError as `open_workdir` does, and where the party has ended its part.
    """
    if directory is None:
        yield InMemory()
        return
    with locked(directory) as folder:
        ledger = _checked_ledger(folder, secret and [secret])
        if ledger.ended:
            raise InputError(f"{folder}: this party has ended its part, and its secret is gone.")
        opened = SiloWorkdir(folder, config, ledger, None, False)
        if description is not None:
            opened = SiteWorkdir(folder, config, ledger, None, False, description)
        try:
            yield opened
        finally:
            opened.close()


def _checked_ledger(folder, seeded):
    """The ledger of `folder`, held against the checkpoints; a finished one's secrets are destroyed. `seeded` are the parties'
    secrets where a seed gives them, else None."""
    ledger, private = ledgers.Ledger(folder / ledgers.FILE), folder / "private"
    for name, anchor in checkpoint.anchors(folder / "checkpoints"):
        ledger.check(anchor, name)
    if ledger.ended:
        party_secrets = seeded or secrets.load(private)
        if party_secrets:  # an end that someone else wrote must not cost the secrets
            ledger.seal_with(b"".join(party_secrets))
        secrets.destroy(private)
    elif not (private / secrets.FILE).exists() and ledger.entries and not seeded:
        raise InputError(
            f"{folder} has a ledger but its secrets are gone: its noise cannot go on; start a new `workdir`."
        )
    return ledger
