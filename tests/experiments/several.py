"""Starts real runs of one or several processes, on loopback (`experiments/forked.py` forks them)."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
BOUND = 240  # seconds, of a busy machine: whatever is waited for, not what is measured


class Starts:
    """Starts runs through `forked.py`, each of one or several processes."""

    def __init__(self, flags, folder):
        self.flags, self.folder, self.logs = flags, folder, {}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.experiments.forked", str(folder / "cache")],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **job):
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, flags, devices, folder, log, blow=None):
        pid = self.ask(start=flags, devices=devices, folder=str(folder), log=str(log), blow=blow)
        self.logs[pid] = log
        return pid

    def begin(self, name, count, devices, *more, folders=None, blows=()):
        """`count` processes of `devices` each on workdir `name` -> their ids; what they say is in `name.I.log`. `blows` has
        {process: (place, what)}, as `forked.py` knows them."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            where = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
        ids = []
        for index in range(count):
            several = [where, f"--processes={count}", f"--process={index}"] if count > 1 else []
            flags = [*self.flags, f"--workdir={self.folder / name}", *several, *more]
            folder = str((folders or [self.folder] * count)[index])
            ids.append(self.start(flags, devices, folder, self.log(name, index), dict(blows).get(index)))
        return ids

    def codes(self, ids):
        """Their exit codes; what they said is printed for whoever reads a failed test."""
        codes = [self.ask(wait=pid, seconds=BOUND) for pid in ids]
        for pid, code in zip(ids, codes, strict=True):
            print(f"--- {self.logs[pid]} ended with {code}\n{self.logs[pid].read_text()[-3000:]}")
        return codes

    def log(self, name, index):
        return self.folder / f"{name}.{index}.log"

    def run(self, name, count, devices, *more, folders=None):
        """Run it to its end, which must be a good one -> the workdir."""
        ids = self.begin(name, count, devices, *more, folders=folders)
        codes = self.codes(ids)
        assert codes == [0] * count, "\n".join(self.log(name, index).read_text() for index in range(count))
        return self.folder / name

    def close(self):
        self.server.stdin.close()
        for pid in self.logs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # with a worker that was left standing
        self.server.wait(30)


def flags(model, table, rounds):
    """The flags of a small run, which the tests of this kind have in common."""
    return [
        f"--model={model}", "--dataset=csv", f"--data_dir={table}", "--text_column=text", "--label_column=label",
        "--labels=good,bad", "--max_length=8", "--clients=4", f"--rounds={rounds}", "--expected_batch_size=8", "--rank=2",
        "--noise_multiplier=1", "--delta=1e-3", "--client_lr=0.1", "--head_lr=1", "--server_momentum=0.5", "--last_layers=1",
        f"--eval_every={rounds}", "--dispatch_rounds=1", "--stall_timeout=150",
    ]  # fmt: skip


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
