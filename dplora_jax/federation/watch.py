"""One end for all processes of a run, whichever of them dies, hangs or makes a mistake (`processes` joins them).

A thread of each tells the others every POLL seconds that it lives and where its main thread is; whoever finds one silent, or
waited for longer than `stall_timeout`, ends the run for all with one sentence that names it, and exit code LOST.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time

from dplora_jax.files import to_json

LOST, STOPPED = 69, 75
POLL, SILENT = 1.0, 10.0  # seconds: between signs of life; without one, when something is known to be wrong
ROOM = "dplora"  # of the service's keys
RESUME = "start all processes again to go on from the last committed round."


class Group:
    """This process's place among the others, and what its watch has seen of them."""

    def __init__(self, client, number, count, stall, address):
        self.client, self.number, self.count, self.stall, self.address = client, number, count, stall, address
        self.silent = patience(stall)
        self.hosts = [f"process {index}" for index in range(count)]
        self.turn, self.steps, self.place = 0, 0, "the start"
        self.paid = set()  # hashes of ledger entries that this process has drawn from
        self.beats = {i: (0, 0, "the start", time.monotonic()) for i in range(count)}  # number, steps, place, when seen
        self.moved = dict.fromkeys(range(count), time.monotonic())
        self.answered = time.monotonic()
        self.leaving, self.code = threading.Event(), 0


def patience(stall):
    """Seconds without a sign of life that are too many: few beside a dispatch's, many beside a network's hiccup."""
    return max(SILENT, min(stall / 10, 100.0))


def start(group):
    """Begin to watch."""
    _abort_with_words(group)
    for work in (_watch, _judge):
        threading.Thread(target=work, args=(group,), daemon=True).start()


def silent(group):
    """The processes that give no sign of life within SILENT seconds from now."""
    start, before = time.monotonic(), dict(group.beats)
    while True:
        # The first signs that come may be from before.
        silent = [i for i, (beat, *_) in group.beats.items() if beat < before[i][0] + 3 and i != group.number]
        if not silent or time.monotonic() > start + SILENT:
            return silent if group.answered > start else [0]
        time.sleep(POLL / 4)


def gone(group, lost, seconds):
    named = ", ".join(f"{group.hosts[index]}, last at {group.beats[index][2]}" for index in lost)
    return f"no sign of life for {seconds:g} s from {named}: it died, or its host hangs. The run has ended; {RESUME}"


def end(group, code, sentence):
    """Make `sentence` what every process says as it exits with `code`; the first to come here decides for all."""
    try:
        group.client.key_value_set(f"{ROOM}/end/first", to_json([code, sentence]))
    except Exception:  # another was first, or process 0 is gone: the watch, or the judge, says so
        pass
    else:
        _say(group, code, sentence)
    time.sleep(SILENT + group.silent)
    _say(group, code, sentence)


_saying = threading.Lock()


def _say(group, code, sentence):
    with _saying:  # held to the end, so that one sentence is said
        os.write(2, f"{'stopped' if code == STOPPED else 'error'}: {sentence}\n".encode())
        group.code = code
        group.leaving.set()  # should JAX abort now, that is how it ends
        if group.number == 0:  # whoever reads the end must find process 0 there
            time.sleep(4 * POLL)
        leave_at_once(code)


def leave_at_once(code):
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
            sign = to_json([beat, group.steps, group.place])
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
            _say(group, LOST, gone(group, [0], group.silent))
        silent = [index for index, (*_, seen) in group.beats.items() if now - seen > group.silent]
        if silent:
            end(group, LOST, gone(group, silent, group.silent))
        least = min(steps for _, steps, *_ in group.beats.values())
        behind = [index for index, (_, steps, *_) in group.beats.items() if steps == least]
        if min(now - group.moved[index] for index in behind) > group.stall:
            end(group, LOST, _late(group, behind))


def _late(group, behind):
    named = ", ".join(f"{group.hosts[index]} at {group.beats[index][2]}" for index in behind)
    return (
        f"no progress for stall_timeout={group.stall:g} s, waiting for {named}. The run has ended; if that was work and no "
        f"hang, give more time; {RESUME}"
    )


def _abort_with_words(group):
    """Let the abort with which JAX answers the loss of process 0 end in a sentence and LOST; any other abort stays what it is."""
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)

    def handler(_):
        if group.leaving.is_set():
            os._exit(group.code)
        if group.number and _lost(group):
            os.write(2, f"error: {gone(group, [0], round(time.monotonic() - group.answered))}\n".encode())
            os._exit(LOST)
        libc.signal(signal.SIGABRT, None)
        os.abort()

    _abort_with_words.kept = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    libc.signal(signal.SIGABRT, ctypes.cast(_abort_with_words.kept, ctypes.c_void_p))


def _lost(group):
    """Whether process 0 is gone; a dying process may listen for a while after its connections have closed."""
    until = time.monotonic() + SILENT
    while _reachable(group):
        if time.monotonic() > until:
            return False
        time.sleep(POLL / 4)
    return True


def _reachable(group):
    """Whether process 0 still listens and has answered of late."""
    host, port = group.address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), 2).close()
    except OSError:
        return False
    return time.monotonic() - group.answered < group.silent
