"""The parent of a process of a run that has several (`processes`): it never touches JAX, so nothing that befalls its worker can
silence it. It ends its worker when any process of the run is lost, and says which.

Each supervisor writes its worker's heartbeats to a file in the workdir, and reads the others'. What each failure leads to:
- A worker makes a mistake, or is killed: its supervisor writes that into its file, and all exit with that code and sentence.
- A worker is aborted by JAX, or a collective fails: another process may be the cause, and is looked for first (`SECONDARY`).
- A process, its supervisor or its host dies or stands still: its heartbeats stop, and the others name it after `patience` (LOST).
- A worker's main thread hangs: all name the place where it is after `stall_timeout` (LOST).
- A supervisor is killed: its worker exits at its next heartbeat. The shared file system hangs: all wait for it.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time

from dplora_jax.errors import InputError, StorageError
from dplora_jax.files import to_json

LOST, STOPPED = 69, 75
POLL, SUSPECT = 1.0, 10.0  # seconds: between heartbeats; without one, where something is known to be wrong
SECONDARY = 2.5 * SUSPECT  # seconds that a failure waits for its cause in another process
RECORD_BYTES = 1 << 13  # of a file of heartbeats, whole from the start: a full disk keeps no end from being written
RESUME = "The run has ended; start all processes again to go on from the last committed round."


class Ended(Exception):
    """The run is at its end: `code`, and the sentence to say (None: nothing)."""

    def __init__(self, code, sentence):
        super().__init__(code, sentence and str(InputError(sentence)))


@dataclasses.dataclass
class Peer:
    """A process of the run, this one too: its name, its file of heartbeats, what it says, and when that came and last got on."""

    name: str
    path: str
    seen: float
    moved: float
    beat: int = 0
    steps: int = 0
    place: str = "the start"

    def read(self, now):
        """Take the newest heartbeat; raises Ended where it is the process's last."""
        try:
            with open(self.path, "rb") as file:
                beat, steps, place, end = json.loads(file.read())
        except (OSError, ValueError):  # none yet, or half of one
            return
        if end:
            raise Ended(*end)
        self.seen = now if beat != self.beat else self.seen
        self.moved = now if steps != self.steps else self.moved
        self.beat, self.steps, self.place = beat, steps, place


class Supervisor:
    """Waits for the process `worker`, whose messages (`processes`) come by `channel`; `stall` is `stall_timeout`, and `alone` the
    sentence for a worker that JAX aborts since the others do not come."""

    def __init__(self, worker, channel, stall, alone):
        self.worker, self.channel, self.stall, self.alone = worker, channel, stall, alone
        self.patience = max(SUSPECT, min(stall / 10, 100.0))  # few beside a dispatch's, many beside a network's hiccup
        self.started = self.judged = time.monotonic()
        self.name, self.path, self.peers = "this process", None, []
        self.beat, self.steps, self.place = 0, 0, "joining the others"
        self.failure = None  # of the worker: (when it is the run's end, code, sentence)

    def run(self):
        """Wait for the run's end, say it, and end the worker -> exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):  # the worker dies of it, or finishes its rounds
            signal.signal(number, lambda *_: self._send(signal.SIGTERM))
        try:
            while True:
                self._listen()
                self._judge()
        except Ended as end:
            code, sentence = end.args
        with contextlib.suppress(OSError):
            self._write([code, sentence] if sentence else None)
        if sentence:
            time.sleep(3 * POLL)  # the others read it before JAX tells them that this one is gone
        self._send(signal.SIGKILL)
        until = time.monotonic() + SUSPECT
        while self.channel and not os.waitpid(self.worker, os.WNOHANG)[0] and time.monotonic() < until:
            time.sleep(POLL / 20)  # while it holds the workdir's lock, nobody can start again
        if sentence:
            print(f"{'stopped' if code == STOPPED else 'error'}: {sentence}", file=sys.stderr, flush=True)
        return code

    def _send(self, number):
        if self.channel:  # else it is gone
            os.kill(self.worker, number)

    def _listen(self):
        """Take the worker's next message, if one comes within POLL seconds."""
        if self.channel is None:
            time.sleep(POLL)
            self._on_at(self.steps, self.place)
        elif self.channel.poll(POLL):
            try:
                kind, *rest = self.channel.recv()
            except (EOFError, OSError):
                self.channel = None
                self._on_exit(os.waitstatus_to_exitcode(os.waitpid(self.worker, 0)[1]))
            else:
                getattr(self, f"_on_{kind}")(*rest)

    def _on_joined(self, number, names, paths):
        now = time.monotonic()
        self.peers = [Peer(name, path, now, now) for name, path in zip(names, paths, strict=True)]
        self.name, self.path = names[number], paths[number]

    def _on_at(self, steps, place):
        self.beat, self.steps, self.place = self.beat + 1, steps, place
        try:
            self._write()
        except OSError as error:
            raise Ended(StorageError.code, f"{self.path} cannot be written ({error.strerror}). {RESUME}") from None

    def _on_failed(self, code, sentence, seconds):
        self.failure = time.monotonic() + seconds, code, sentence

    def _on_left(self, code):
        until = time.monotonic() + self.patience
        with contextlib.suppress(EOFError, OSError):  # its exit; all that it had to do is done
            while self.channel.poll(max(0, until - time.monotonic())):
                self.channel.recv()
        os.unlink(self.path)
        self.path = None
        raise Ended(code, None)

    def _on_exit(self, code):
        """The worker is gone with `code`, or minus the signal that killed it."""
        if self.failure:
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        sentence = f"{self.name} {how} at {self.place}. {RESUME}"
        if code == -signal.SIGABRT and not self.peers:
            sentence = self.alone
        if code == -signal.SIGTERM:
            self._on_failed(STOPPED, f"{self.name} was stopped by SIGTERM before a round began. {RESUME}", 0)
        else:  # JAX aborts whoever has lost process 0
            self._on_failed(LOST, sentence, SECONDARY if code >= 0 or code == -signal.SIGABRT else 0)

    def _write(self, end=None):
        if self.path:
            text = to_json([self.beat, self.steps, self.place, end]).encode()
            with open(self.path, "r+b") as file:  # closed each time, for NFS to show it
                file.write(text.ljust(RECORD_BYTES))

    def _judge(self):
        """Raise Ended where a process has ended the run, gives no sign of life, or keeps the others waiting, for too long."""
        now = time.monotonic()
        paused, self.judged = now - self.judged > self.patience / 2, now
        for peer in self.peers:
            peer.read(now)
            if paused:  # it was this one that stood still: what it knows of the others is old
                peer.seen = peer.moved = now
        limit = SUSPECT if self.failure else self.patience
        if silent := [peer for peer in self.peers if now - peer.seen > limit]:
            named = ", ".join(f"{peer.name}, last at {peer.place}" for peer in silent)
            raise Ended(LOST, f"no sign of life for {limit:g} s from {named}: it died, or its host hangs. {RESUME}")
        if self.failure:
            if now >= self.failure[0]:
                raise Ended(*self.failure[1:])
        elif not self.peers and now - self.started > 2 * self.stall:
            raise Ended(LOST, f"{self.name} hangs at {self.place}. {RESUME}")
        elif self.peers:
            least = min(peer.steps for peer in self.peers)
            behind = [peer for peer in self.peers if peer.steps == least]
            if all(now - peer.moved > self.stall for peer in behind):
                named = ", ".join(f"{peer.name} at {peer.place}" for peer in behind)
                raise Ended(
                    LOST,
                    f"no progress for stall_timeout={self.stall:g} s, waiting for {named}: if that was work and no hang, give "
                    f"more time. {RESUME}",
                )
