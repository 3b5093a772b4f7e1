"""A process of a run without JAX: a real supervisor, whose worker follows a story.

Arguments: number, count, folder, stall timeout, and the story's words. `step` works a little; `wait` lives on where it is, for
ever; `leave` ends well; `2:words` fails with that code and sentence; `late:words` fails with 1 and what may have another process
as its cause; `KILL`, `ABRT`, `TERM` and `STOP` strike the worker, `gone` the whole process.
"""

import multiprocessing
import os
import pathlib
import signal
import sys
import time

from dplora_jax.federation import supervisor

supervisor.POLL, supervisor.SUSPECT, supervisor.SECONDARY = 0.1, 3.0, 7.5
number, count, folder, stall = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]), float(sys.argv[4])
paths = [folder / str(index) for index in range(count)]
paths[number].write_bytes(b" " * supervisor.RECORD_BYTES)
while not all(path.exists() for path in paths):
    time.sleep(0.01)
receiver, sender = multiprocessing.Pipe(duplex=False)
parent = os.getpid()
if worker := os.fork():
    sender.close()
    sys.exit(supervisor.Supervisor(worker, receiver, stall, "nobody came.").run())
sender.send(("joined", number, [f"process {index}" for index in range(count)], [str(path) for path in paths]))
steps = 0


def beat(times):
    for _ in range(times):
        sender.send(("at", steps, f"step {steps}"))
        time.sleep(supervisor.POLL)


for word in sys.argv[5:]:
    code, _, sentence = word.partition(":")
    if word == "step":
        steps += 1
        beat(10)
    elif word == "leave":
        sender.send(("left", 0))
        os._exit(0)
    elif word == "gone":
        os.kill(parent, signal.SIGKILL)
        os._exit(1)
    elif word.isupper():
        os.kill(os.getpid(), signal.Signals[f"SIG{word}"])
    else:
        if code == "late":
            sender.send(("failed", 1, sentence, supervisor.SECONDARY))
        elif sentence:
            sender.send(("failed", int(code), sentence, 0))
        beat(10**6)
