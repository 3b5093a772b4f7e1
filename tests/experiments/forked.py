"""Real processes that start quickly: forked from one that has imported everything and touched no device.

A line of JSON in, a line of JSON out: {"start": flags, "devices": n, "folder": where it runs, "log": file} -> its id;
{"wait": id, "seconds": n} -> its exit code (minus the signal that ended it), or null when it still runs. With "blow": [place,
what], the process is struck where it says that it is at `place`: by "KILL worker", "STOP process" and the like, by an
exception of ERRORS, or by "full" (no file may grow any more).
"""

import errno
import json
import os
import resource
import signal
import sys
import time
import traceback

os.environ |= {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
os.environ |= {"JAX_COMPILATION_CACHE_DIR": sys.argv[1], "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import orbax.checkpoint  # noqa: F401
import safetensors.numpy  # noqa: F401

from dplora_jax import errors
from dplora_jax.federation import processes
from dplora_jax.models.tokenizer import load_tokenizer  # noqa: F401
from experiments import run
from tests import compilation

ERRORS = {
    "mistake": errors.InputError("--rank=7 is wrong."),
    "endless": errors.NotFiniteError("no number is finite any more."),
    "broken": OSError(errno.EIO, "broken", "records.csv"),
    "fault": KeyError("Mrs Marker's cyst"),
}


def strike(place, what):
    """Let this process be struck by `what` when it comes to `place`."""
    real = processes.at

    def at(here):
        real(here)
        if not here.startswith(place):
            return
        if what in ERRORS:
            raise ERRORS[what]
        if what == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        else:
            blow, target = what.split()
            if target == "process":
                os.kill(os.getppid(), signal.Signals[f"SIG{blow}"])
            os.kill(os.getpid(), signal.Signals[f"SIG{blow}"])

    processes.at = at


def start(job):
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)  # its worker too is ended by it
    code = 99
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(job["folder"])
        os.environ["XLA_FLAGS"] = f"{compilation.FLAGS} --xla_force_host_platform_device_count={job['devices']}"
        if job.get("blow"):
            strike(*job["blow"])
        code = run.main(job["start"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(job):
    until = time.monotonic() + job["seconds"]
    while True:
        pid, status = os.waitpid(job["wait"], os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.05)


if __name__ == "__main__":
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(start(job) if "start" in job else wait(job)), flush=True)
