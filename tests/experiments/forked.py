"""Real processes that start quickly: forked from one that has imported everything and touched no device.

A line of JSON in, a line of JSON out: {"start": flags, "devices": n, "folder": where it runs, "log": file} -> its id;
{"wait": id, "seconds": n} -> its exit code (minus the signal that ended it), or null when it still runs.
"""

import json
import os
import sys
import time
import traceback

os.environ |= {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
os.environ |= {"JAX_COMPILATION_CACHE_DIR": sys.argv[1], "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import orbax.checkpoint  # noqa: F401
import safetensors.numpy  # noqa: F401

from dplora_jax.models.tokenizer import load_tokenizer  # noqa: F401
from experiments import run


def start(job):
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(job["folder"])
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={job['devices']}"
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
