"""Several processes as one run: joining by `jax.distributed`, agreeing by collectives, and one end for all (`supervisor`).

Each process drives its own devices and runs the same program; process 0 decides and writes. With one process nothing here does
anything, and JAX is not touched.
"""

import contextlib
import json
import multiprocessing
import os
import pathlib
import secrets
import signal
import socket
import sys
import threading
import time

import numpy as np

from dplora_jax import guard
from dplora_jax.config import PROCESS, deciding, to_flat
from dplora_jax.errors import InputError, Refused, storage
from dplora_jax.federation.supervisor import LOST, POLL, RECORD_BYTES, SECONDARY, SUSPECT, Supervisor
from dplora_jax.files import to_json

FOLDER = ".processes"  # of the workdir: heartbeats
ROW = 1 << 10  # bytes of a process's value that pass in one collective

_group = None


class Group:
    """A worker's place among the others, and its messages to its supervisor."""

    def __init__(self, channel, number, count):
        self.channel, self.number, self.count, self.name = channel, number, count, "this process"
        self.steps, self.place = 0, "joining the others"
        self.paid = set()  # hashes of ledger entries that this process has drawn from
        self.sending = threading.Lock()

    def tell(self, *message):
        try:
            with self.sending:
                self.channel.send(message)
        except OSError:  # the supervisor is gone, and with it whoever would end this process
            os._exit(LOST)

    def beat(self):
        while True:
            self.tell("at", self.steps, self.place)
            time.sleep(POLL)


def count():
    """How many processes the run has."""
    return _group.count if _group else 1


def number():
    """Which of them this one is, from 0."""
    return _group.number if _group else 0


def primary():
    """Whether this process is the one that writes: ledger, metrics, adapter, report."""
    return number() == 0


def join(config):
    """Join the run's other processes, if `config` names any; nothing of JAX may have run before. Returns None to the process that
    is to do the work, which then is a child of its own, and at the end the exit code to its supervisor."""
    global _group
    if config.execution.coordinator is None:
        return None
    receiver, sender = multiprocessing.Pipe(duplex=False)
    sys.stdout.flush()
    if worker := os.fork():
        sender.close()
        return Supervisor(worker, receiver, config.execution.stall_timeout, f"{_alone(config)}.").run()
    receiver.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor makes a SIGTERM of it
    _group = Group(sender, config.execution.process, config.execution.processes)
    threading.Thread(target=_group.beat, daemon=True).start()
    _connect(config)
    _introduce(config)
    return None


def addresses(coordinator):
    """JAX's arguments for where process 0 is found, and where it listens: there alone. Left to itself it would listen to every
    network, and it asks nobody who he is."""
    if coordinator != "auto":
        where = {"coordinator_address": coordinator, "cluster_detection_method": "deactivate"}
    else:  # JAX finds process 0's host; the port is named for it, since it is not said where it would listen
        job = int(os.environ.get("SLURM_JOB_ID", 0))
        port = os.environ.setdefault("JAX_COORDINATOR_PORT", str(61440 + job % 4096))
        coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS", f"{socket.gethostname()}:{port}")
        where = {}
    return where | {"coordinator_bind_address": os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator)}


def _connect(config):
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours: it ends a dispatch, not the process
    stall = int(config.execution.stall_timeout)
    try:
        jax.distributed.initialize(
            num_processes=config.execution.processes,
            process_id=config.execution.process,
            initialization_timeout=stall,
            heartbeat_timeout_seconds=stall,  # the supervisors find a loss sooner, and name it
            shutdown_timeout_seconds=int(SUSPECT),
            **addresses(config.execution.coordinator),
        )
        _group.number, _group.count = jax.process_index(), jax.process_count()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        _fail(LOST, f"{_alone(config)} ({reason}).")


def _alone(config):
    """What to say, but for the full stop, where the others do not come."""
    execution = config.execution
    return (
        f"process {execution.process} could not join the others by coordinator={execution.coordinator} within "
        f"{execution.stall_timeout:.0f} s: start all {execution.processes or ''} processes, and let them reach process 0 at that "
        "address: it listens there alone, or where JAX_COORDINATOR_BIND_ADDRESS says"
    )


def _introduce(config):
    """Make the processes known to each other and to their supervisors. InputError where they differ."""
    folder, name = pathlib.Path(config.output.workdir) / FOLDER, secrets.token_hex(8)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b" " * RECORD_BYTES)
    except OSError as error:
        raise storage(error) or InputError(
            f"workdir={config.output.workdir} cannot be written ({error.strerror})."
        ) from None
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            if time.time() - path.stat().st_mtime > 86400:  # of a process that was killed
                path.unlink()
    fields = {name: repr(value) for name, value in to_flat(config).items() if name not in deciding(PROCESS)}
    all_said = gather({"host": socket.gethostname(), "file": name, "fields": fields})
    paths = [str(folder / one["file"]) for one in all_said]
    names = [f"process {index} ({one['host']})" for index, one in enumerate(all_said)]
    _group.name = names[_group.number]
    _group.tell("joined", _group.number, names, paths)
    differ = sorted(
        {f"`{n}`" for one in all_said for n in fields if one["fields"].get(n) != all_said[0]["fields"].get(n)}
    )
    if differ:
        raise InputError(f"the processes were started with different {', '.join(differ)}: start all with the same.")
    for name, path in zip(names, paths, strict=True):
        if not os.path.exists(path):
            raise InputError(f"{folder} has no file of {name}: `workdir` must be one folder that all processes see.")


def gather(value):
    """Every process's `value` (JSON), in order; returns when all have come here."""
    text = to_json(value).encode()
    if _group is None:
        return [json.loads(text)]
    from jax.experimental import multihost_utils

    sent = len(text).to_bytes(8, "little") + text
    width = ROW
    while True:
        rows = multihost_utils.process_allgather(np.frombuffer(sent[:width].ljust(width, b"\0"), np.uint8))
        rows = [row.tobytes() for row in rows.reshape(_group.count, width)]
        ends = [8 + int.from_bytes(row[:8], "little") for row in rows]
        if max(ends) <= width:
            return [json.loads(row[8:end]) for row, end in zip(rows, ends, strict=True)]
        width = 1 << max(ends).bit_length()


def agree(make):
    """What `make()` (JSON) is at process 0, for all; the others do not call it."""
    return gather(make() if primary() else None)[0]


def first(tree):
    """Process 0's `tree` of arrays, for all, who have one of the same shapes."""
    if _group is None:
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(tree)


def once(paid):
    """Raise where this process was told before to draw from the ledger entry `paid` (its hash): whoever speaks for process 0
    might have two transcripts made under one set of keys, whose difference has no noise."""
    if _group is None:  # what decides is this process itself
        return
    if paid in _group.paid:
        raise InputError(
            "process 0 names a ledger entry for a second dispatch, which would draw the same keys again: trust neither its host "
            "nor the network to it."
        )
    _group.paid.add(paid)


def meet():
    """Return when all processes have come here."""
    gather(None)


def any_of(flag):
    """Whether any process has `flag` set."""
    return any(gather(bool(flag)))


def at(place):
    """Say where this process is: from here on the others wait for it `stall_timeout` seconds at most."""
    if _group:
        _group.steps, _group.place = _group.steps + 1, place
        _group.tell("at", _group.steps, _group.place)


def leave(code):
    """Part from the others in order before exiting with `code`, which holds whatever happens after."""
    if _group is None:
        return
    import jax

    at("the end")
    meet()
    _group.tell("left", code)
    jax.distributed.shutdown()


def fail(error):
    """End the run for all because of an exception here: what a user can mend, or a fault (1)."""
    if _group is None:
        return
    seconds = SECONDARY if _secondary(error) else 0
    if isinstance(error, InputError):
        who = "" if isinstance(error, Refused) else f"{_group.name}: "  # whose clients it concerns is not for all
        _fail(error.code, f"{who}{error}", seconds)
    guard.show(error)
    _fail(1, f"{_group.name} failed with {type(error).__name__}: see what it printed.", seconds or 1.5 * SUSPECT)


def _secondary(error):
    """Whether `error` comes of a failed collective, as it does where another process was lost."""
    while error is not None:
        if type(error).__name__ == "JaxRuntimeError" and not str(error).startswith("RESOURCE_EXHAUSTED"):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fail(code, sentence, seconds=0):
    """Leave the end to the supervisor, and wait for it: where process 0 exits by itself, JAX aborts the others with a stack."""
    sys.stdout.flush()
    _group.tell("failed", code, sentence, seconds)
    threading.Event().wait()
