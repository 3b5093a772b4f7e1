"""Several processes as one run, by JAX's own coordination service: joining, agreeing, and an end for all when one is lost.

Each process drives its own devices and runs the same program. A thread of each tells the others every POLL seconds that it
lives and where its main thread is; whoever finds one silent, or kept waiting for `stall_timeout`, ends the run for all
with one sentence that names it, and exit code LOST. With one process nothing here does anything, and JAX is not touched.
"""

import ctypes
import dataclasses
import functools
import json
import os
import signal
import socket
import sys
import threading
import time

from dplora_jax.errors import InputError

LOST = 69
POLL, SILENT = 1.0, 10.0  # seconds: between signs of life; without one, when something is known to be wrong
ROOM = "dplora"  # of the service's keys
SAME = ("coordinator", "processes", "process", "stall_timeout")  # flags that need not be the same everywhere
RESUME = "start all processes again to go on from the last committed round."


class _Group:
    """This process's place among the others, and what its watch has seen of them."""

    def __init__(self, client, number, count, stall, address):
        self.client, self.number, self.count, self.stall, self.address = client, number, count, stall, address
        self.silent = _patience(stall)
        self.hosts = [f"process {index}" for index in range(count)]
        self.turn, self.steps, self.place = 0, 0, "the start"
        self.beats = {
            index: (0, 0, "the start", time.monotonic()) for index in range(count)
        }  # number, steps, place, seen
        self.moved = dict.fromkeys(range(count), time.monotonic())
        self.answered = time.monotonic()
        self.leaving, self.code = threading.Event(), 0


_group = None


def _patience(stall):
    """Seconds without a sign of life that are too many: few beside a dispatch's, many beside a network's hiccup."""
    return max(SILENT, min(stall / 10, 100.0))


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
    """Join the run's other processes, if the flags name any. Nothing of JAX may have run before."""
    global _group
    if config.coordinator is None:
        return
    import jax
    from jax._src import distributed
    from jax._src.lib import _jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours: it ends a dispatch, not the process
    explicit = config.coordinator != "auto"
    where = {"coordinator_address": config.coordinator, "cluster_detection_method": "deactivate"} if explicit else {}
    if config.coordinator.startswith(("127.0.0.1:", "localhost:")):
        where["coordinator_bind_address"] = config.coordinator  # else it would listen to every network
    bound = int(_patience(config.stall_timeout))
    real = _jax.get_distributed_runtime_client
    # Without it JAX prints a C++ stack before it aborts; no Python can take what it would be called with, and so it aborts too.
    _jax.get_distributed_runtime_client = functools.partial(real, missed_heartbeat_callback=lambda _: None)
    try:
        jax.distributed.initialize(
            num_processes=config.processes,
            process_id=config.process,
            initialization_timeout=max(1, int(config.stall_timeout)),
            heartbeat_timeout_seconds=2 * bound,  # ours comes first, with a better sentence
            shutdown_timeout_seconds=bound,
            **where,
        )
    except Exception as error:
        print(
            f"error: process {config.process} could not join the others at {config.coordinator} within "
            f"{config.stall_timeout:g} s ({type(error).__name__}): start all {config.processes or ''} processes, and let "
            "them reach that port of process 0.",
            file=sys.stderr,
        )
        _exit(LOST)
    finally:
        _jax.get_distributed_runtime_client = real
    state = distributed.global_state
    _group = _Group(
        state.client, state.process_id, state.num_processes, config.stall_timeout, state.coordinator_address
    )
    _abort_with_words()
    for work in (_watch, _judge):
        threading.Thread(target=work, args=(_group,), daemon=True).start()
    flags = {name: repr(value) for name, value in dataclasses.asdict(config).items() if name not in SAME}
    told = gather({"host": socket.gethostname(), "flags": flags})
    _group.hosts = [f"process {index} ({one['host']})" for index, one in enumerate(told)]
    differ = sorted({f"--{n}" for one in told for n in flags if one["flags"].get(n) != told[0]["flags"].get(n)})
    if differ:
        raise InputError(
            f"the processes were started with different {', '.join(differ)}: start all with the same flags."
        )


def gather(value):
    """Every process's `value` (JSON), in order; returns when all have come here."""
    group = _group
    if group is None:
        return [json.loads(json.dumps(value))]
    group.turn += 1
    folder = f"{ROOM}/turn/{group.turn}"
    group.client.key_value_set(f"{folder}/{group.number}", json.dumps(value))
    # The watch ends a wait that is too long, and with a better sentence than the barrier's own.
    group.client.wait_at_barrier(f"{ROOM}-{group.turn}", int(1000 * (2 * group.stall + 100)))
    told = {key.rsplit("/", 1)[1]: text for key, text in group.client.key_value_dir_get(folder)}
    if group.turn > 1:  # all have read the turn before, or they would not be here
        group.client.key_value_delete(f"{ROOM}/turn/{group.turn - 1}/{group.number}")
    return [json.loads(told[str(index)]) for index in range(group.count)]


def agree(make):
    """What `make()` (JSON) is at process 0, for all; the others do not call it."""
    return gather(make() if primary() else None)[0]


def meet():
    """Return when all processes have come here."""
    gather(None)


def any_of(flag):
    """Whether any process has `flag` set."""
    return any(gather(bool(flag)))


def at(place):
    """Tell the others where this process is: from here on they wait for it `stall_timeout` seconds at most."""
    if _group:
        _group.steps, _group.place = _group.steps + 1, place


def leave(code):
    """Part from the others in order before exiting with `code`; not being able to is no fault any more."""
    if _group is None:
        return
    import jax

    at("the end")
    meet()
    _group.code = code
    _group.leaving.set()
    try:
        jax.distributed.shutdown()
    except Exception as error:  # one of them died after the work was done
        print(f"warning: the processes did not part in order ({type(error).__name__}).", file=sys.stderr)
    sys.stdout.flush()


def fail(error):
    """End the run for all because of an exception here: a mistake of the user's (2), a lost process (LOST), or a fault (1)."""
    group = _group
    if isinstance(error, InputError):
        _end(group, 2, f"{group.hosts[group.number]}: {error}")
    lost = _silent(group)
    if lost:
        _end(group, LOST, _gone(group, lost, SILENT))
    import traceback

    traceback.print_exception(error)
    _end(group, 1, f"{group.hosts[group.number]} failed with {type(error).__name__}: see what it printed.")


def _silent(group):
    """The processes that give no sign of life within SILENT seconds from now."""
    start, before = time.monotonic(), dict(group.beats)
    while True:
        # The first signs that come may be from before.
        silent = [i for i, (beat, *_) in group.beats.items() if beat < before[i][0] + 3 and i != group.number]
        if not silent or time.monotonic() > start + SILENT:
            return silent if group.answered > start else [0]
        time.sleep(POLL / 4)


def _gone(group, lost, seconds):
    named = ", ".join(f"{group.hosts[index]}, last at {group.beats[index][2]}" for index in lost)
    return f"no sign of life for {seconds:g} s from {named}: it died, or its host hangs. The run has ended; {RESUME}"


def _end(group, code, sentence):
    """Make `sentence` what every process says as it exits with `code`; the first to come here decides for all."""
    try:
        group.client.key_value_set(f"{ROOM}/end/first", json.dumps([code, sentence]))
    except Exception:  # another was first, or process 0 is gone: the watch, or the judge, says so
        pass
    else:
        _say(group, code, sentence)
    time.sleep(SILENT + group.silent)
    _say(group, code, sentence)


_saying = threading.Lock()


def _say(group, code, sentence):
    with _saying:  # held to the end, so that one sentence is said
        os.write(2, f"error: {sentence}\n".encode())
        if group.number == 0:  # whoever reads the end must find process 0 there
            time.sleep(4 * POLL)
        _exit(code)


def _exit(code):
    """Exit without waiting for anything: at the interpreter's own exit JAX waits for the others."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _watch(group):
    """Every POLL seconds: say that this process lives, read the others' signs, and end when one has ended the run for all."""
    beat = 0
    while not group.leaving.is_set():
        beat += 1
        try:
            sign = json.dumps([beat, group.steps, group.place])
            group.client.key_value_set(f"{ROOM}/signs/{group.number}", sign, allow_overwrite=True)
            signs = group.client.key_value_dir_get(f"{ROOM}/signs/")
            ended = group.client.key_value_dir_get(f"{ROOM}/end/")
        except Exception:  # process 0 is gone: JAX aborts on that, or the judge ends
            time.sleep(POLL)
            continue
        now = group.answered = time.monotonic()
        for key, text in signs:
            index, (number, steps, place) = int(key.rsplit("/", 1)[1]), json.loads(text)
            if group.beats[index][0] != number:
                if group.beats[index][1] != steps:
                    group.moved[index] = now
                group.beats[index] = (number, steps, place, now)
        if ended:
            _say(group, *json.loads(ended[0][1]))
        time.sleep(max(POLL, group.count / 100))


def _judge(group):
    """End the run when a process gives no sign of life, or keeps the others waiting, for too long."""
    last = time.monotonic()
    while not group.leaving.wait(POLL):
        now = time.monotonic()
        if now - last > group.silent / 2:  # it was this process that stood still: what it knows of the others is old
            group.answered = now
            group.beats = {index: (*known, now) for index, (*known, _) in group.beats.items()}
            group.moved = dict.fromkeys(group.moved, now)
        last = now
        if now - group.answered > group.silent:
            _say(group, LOST, _gone(group, [0], group.silent))
        silent = [index for index, (*_, seen) in group.beats.items() if now - seen > group.silent]
        if silent:
            _end(group, LOST, _gone(group, silent, group.silent))
        least = min(steps for _, steps, *_ in group.beats.values())
        behind = [index for index, (_, steps, *_) in group.beats.items() if steps == least]
        if min(now - group.moved[index] for index in behind) > group.stall:
            _end(group, LOST, _late(group, behind))


def _late(group, behind):
    named = ", ".join(f"{group.hosts[index]} at {group.beats[index][2]}" for index in behind)
    return (
        f"no progress for --stall_timeout={group.stall:g} s, waiting for {named}. The run has ended; if that was work and no "
        f"hang, give more time; {RESUME}"
    )


def _abort_with_words():
    """Let the abort with which JAX answers the loss of process 0 end in a sentence and LOST; any other abort stays what it is."""
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)

    def handler(_):
        group = _group
        if group.leaving.is_set():
            os._exit(group.code)
        if group.number and not _reachable(group):
            os.write(2, f"error: {_gone(group, [0], round(time.monotonic() - group.answered))}\n".encode())
            os._exit(LOST)
        libc.signal(signal.SIGABRT, None)
        os.abort()

    _abort_with_words.kept = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    libc.signal(signal.SIGABRT, ctypes.cast(_abort_with_words.kept, ctypes.c_void_p))


def _reachable(group):
    """Whether process 0 still listens and has answered of late."""
    host, port = group.address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), 2).close()
    except OSError:
        return False
    return time.monotonic() - group.answered < group.silent
