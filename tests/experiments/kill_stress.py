"""Kill a real run again and again, and see that it ends as if nothing had happened.

    python -m tests.experiments.kill_stress --kills=200    # at random instants and boundaries, one mesh or changing ones
    python -m tests.experiments.kill_stress --boundaries   # once at each boundary: what the test suite does

Each start is forked from this process, which has imported everything and touched no device, and compiled programs come from a
cache. A journal of its own, apart from the ledger, notes for each dispatch which keys it uses, on what, and what came out.
"""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import random
import select
import signal
import tempfile
import time
import traceback

from tests import compilation

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {compilation.FLAGS}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Some of it for the forks alone: what is imported here costs them nothing.
import datasets  # noqa: F401
import jax
import matplotlib.pyplot  # noqa: F401
import numpy as np
import orbax.checkpoint  # noqa: F401
import safetensors.numpy

from dplora_jax.federation import dispatch
from dplora_jax.federation.federation import Federation
from dplora_jax.models.tokenizer import load_tokenizer
from dplora_jax.privacy import accounting
from dplora_jax.privacy.ledger import rebuild
from experiments import ledger, run
from tests.experiments.kill_boundaries import CALLS, IN_ORDER, TORN, arm

ROUNDS = 6
FLAGS = [
    "--dataset=csv", "--text_column=text", "--label_column=label", "--max_length=8", "--clients=2", f"--rounds={ROUNDS}",
    "--local_steps=2", "--expected_batch_size=8", "--rank=2", "--delta=1e-3", "--client_lr=0.1", "--head_lr=1",
    "--server_momentum=0.5", "--ema=0.5", "--eval_every=0", "--dispatch_rounds=2", "--nocache_frozen",
]  # fmt: skip


def digest(tree):
    """SHA-256 of a pytree's arrays."""
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))).hexdigest()


def keep_journal(path):
    """Note every dispatch before it runs and after, in a file that the program knows nothing of."""
    real = dispatch.execute

    def note(**line):
        with open(path, "ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")

    def execute(job, state, rounds, attempt):
        drawn = dispatch.round_keys(job, rounds, attempt)
        keys = [digest({name: of[i] for name, of in drawn.items()}) for i in range(rounds[1] - rounds[0])]
        p = job.prepared
        inputs = digest((state, p.placement.clients, p.placement.data)), str(dict(p.mesh.shape)), len(keys)
        promised = json.loads(job.ledger.head_path.read_text())["entries"]
        note(
            rounds=list(rounds), attempt=attempt, keys=keys, inputs=inputs, charged=promised == len(job.ledger.entries)
        )
        result = real(job, state, rounds, attempt)
        note(rounds=list(rounds), attempt=attempt, keys=keys, outputs=digest(result[0]))
        return result

    dispatch.execute = execute


def fork(work):
    """Fork a process that does `work()` and exits with what that returns -> its id."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code or 0)
    return pid


def start(arguments, folder, boundary=None, wait=None):
    """Fork one start of the run -> its wait status. It dies at `boundary` (name, nth), or `wait` = (training begun?, seconds)
    after it was forked or its training begun, or ends by itself."""
    reader, writer = os.pipe()

    def work():
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        real = Federation._restored
        Federation._restored = lambda *arguments: (os.write(writer, b"t"), real(*arguments))[1]
        keep_journal(folder.with_suffix(".journal"))
        if boundary:
            arm(*boundary)
        return run.main([*arguments, f"--workdir={folder}"])

    pid = fork(work)
    os.close(writer)
    if wait:
        training, seconds = wait
        if training:
            select.select([reader], [], [])
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    os.close(reader)
    return os.waitpid(pid, 0)[1]


def fail(folder, words):
    tail = folder.with_suffix(".log").read_text()[-3000:]
    raise SystemExit(f"FAILED in {folder}: {words}\n{tail}")


def finish(arguments, folder):
    """Let the run come to its end."""
    status = start(arguments, folder)
    if os.waitstatus_to_exitcode(status) != 0:
        fail(folder, f"the last start ended with {status}")


def adapter(folder):
    return safetensors.numpy.load_file(folder / "adapter" / "adapter_model.safetensors")


def check(folder, reference, same_mesh):
    """Everything that must hold of a run that was killed on its way -> the rounds that it paid for and lost."""
    entries = ledger.verify(folder).ledger
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shown, charged = [line["round"] for line in lines], entries.charged_rounds()
    begun = {(r, e["attempt"]) for e in entries.begun for r in range(*e["rounds"])}
    journal = [json.loads(line) for line in folder.with_suffix(".journal").read_text().splitlines()]
    found = collections.defaultdict(set)
    for line in journal:
        for key in line["keys"]:
            for kind in ("inputs", "outputs"):
                if kind in line:
                    found[key, kind].add(str(line[kind]))
    if any(len(values) > 1 for values in found.values()):
        fail(folder, "a key was used on different inputs, or gave different outputs")
    if not all(line.get("charged", True) for line in journal):
        fail(folder, "a dispatch ran before its charge was promised")
    ran = {(r, line["attempt"]) for line in journal for r in range(*line["rounds"])}
    if not ran <= begun or charged != len(begun):
        fail(folder, f"{charged} rounds were charged, {len(begun)} begun, {len(ran)} run")
    if shown != list(range(len(shown))) or (same_mesh and len(shown) != ROUNDS + 1):
        fail(folder, f"rounds {shown} are shown")
    if same_mesh and (charged != ROUNDS or {attempt for _, attempt in begun} != {0}):
        fail(folder, f"{charged} rounds were charged on one mesh")
    if entries.epsilons(1e-3) != lines[-1]["epsilon"] or max(lines[-1]["epsilon"]) > 8:
        fail(folder, f"epsilon {lines[-1]['epsilon']} is shown")
    if same_mesh and any(not np.array_equal(value, reference[name]) for name, value in adapter(folder).items()):
        fail(folder, "the adapter is not the uninterrupted run's")
    return charged - (len(shown) - 1)


def prepare(scratch):
    """Write model and tables, let a run come to its end untouched -> (arguments, its adapter)."""
    jax.config.update("jax_compilation_cache_dir", str(scratch / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_disable_most_optimizations", True)
    for name in ("model", "tables"):
        (scratch / name).mkdir()

    def write():
        from tests import conftest

        conftest.write_bert(scratch / "model")
        conftest.write_table(scratch / "tables")

    if os.waitpid(fork(write), 0)[1] != 0:
        raise SystemExit("the tiny model could not be written")
    load_tokenizer(scratch / "model")
    arguments = [f"--model={scratch / 'model'}", f"--data_dir={scratch / 'tables'}", *FLAGS, "--epsilon=8", "--seed=1"]
    finish([*arguments, "--mesh=1x1"], scratch / "whole")
    for client in ledger.verify(scratch / "whole").ledger.begun[0]["clients"]:
        for grid in (1e-2, 1e-3):  # kept in a cache that the forks inherit
            accounting.step_loss(rebuild(client), grid)
    return arguments, adapter(scratch / "whole")


def at_each_boundary(scratch):
    """One run, killed once at each boundary -> how many kills."""
    arguments, reference = prepare(scratch)
    arguments, folder = [*arguments, "--mesh=1x1"], scratch / "killed"
    for boundary in IN_ORDER:
        status = start(arguments, folder, boundary)
        if not os.WIFSIGNALED(status):
            fail(folder, f"{boundary} was not met: {status}")
    finish(arguments, folder)
    check(folder, reference, same_mesh=True)
    return len(IN_ORDER)


def at_random(scratch, kills, seed):
    """Runs, each killed up to ten times at random instants or boundaries, every third without --seed and on changing
    meshes; prints the counts so far after each run."""
    arguments, reference = prepare(scratch)
    draw, counts = random.Random(seed), collections.Counter()
    clock = time.monotonic()
    finish([*arguments, "--mesh=1x1"], scratch / "timed")
    seconds = time.monotonic() - clock  # of a start with everything compiled
    while counts["kills"] < kills:
        folder = scratch / f"run{counts['runs']}"
        same_mesh = counts["runs"] % 3 != 2
        one = "1x1" if same_mesh else draw.choice(["1x1", "2x1"])
        given = arguments if same_mesh else [flag for flag in arguments if flag != "--seed=1"]
        for _ in range(min(10, kills - counts["kills"])):
            mesh = one if same_mesh else draw.choice(["1x1", "2x1"])
            plan, boundary, wait = draw.random(), None, None
            if plan < 0.4:
                boundary = draw.choice([*CALLS, *TORN]), draw.choice([1, 1, 1, 2, 3])
            else:
                wait = plan < 0.9, draw.uniform(0, seconds * (0.5 if plan < 0.9 else 1))
            status = start([*given, f"--mesh={mesh}"], folder, boundary, wait)
            if not os.WIFSIGNALED(status):
                if os.waitstatus_to_exitcode(status) != 0:
                    fail(folder, f"a start ended with {status}")
                break
            counts["kills"] += 1
            counts["at boundaries" if boundary else "at random instants"] += 1
        finish([*given, f"--mesh={one}"], folder)
        lost = check(folder, reference, same_mesh)
        counts["runs"] += 1
        counts["runs on changing meshes"] += not same_mesh
        counts["rounds paid for and lost, all on changing meshes"] += lost
        print(dict(counts), flush=True)
    return counts["kills"]


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--boundaries", action="store_true", help="once at each boundary, and no more")
    chosen = options.parse_args()
    clock = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        count = at_each_boundary(scratch) if chosen.boundaries else at_random(scratch, chosen.kills, chosen.seed)
    print(f"{count} kills: no round lost, none charged twice, no key on two inputs ({time.monotonic() - clock:.0f} s)")


if __name__ == "__main__":
    main()
