"""Real processes over the mailbox: sites, relays and a coordinator, killed and started again, and run by users of their own."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import stat
import subprocess
import sys
import time

import numpy as np
import pytest

from dplora_jax.privacy.ledger import Ledger
from dplora_jax.silos import keys, plan
from experiments import ledger, silo
from tests.experiments.small_runs import fit
from tests.silos import small_silos

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 300
SETTINGS = [
    "--dataset=csv", "--labels=bad,good", "--rank=2", "--rounds=3", "--epsilon=8", "--delta=1e-3", "--max_length=8",
    "--expected_batch_size=8", "--client_lr=0.1", "--head_lr=1", "--server_momentum=0.5", "--seed=3", "--eval_every=1",
]  # fmt: skip
MASKED = ["--trust=distributed", "--noise=hardened", "--survivors=3", "--colluding=1"]
COLUMNS = ["--text_column=text", "--label_column=label"]


class Houses:
    """The houses of three sites and a coordinator in `folder`, and the processes that run in them."""

    def __init__(self, folder, tiny_bert, finance_table, *settings):
        self.folder, self.data, self.model = folder, folder / "data", f"--model={tiny_bert}"
        self.running, self.settings = {}, [*SETTINGS, *settings]
        rows = (finance_table / "train.csv").read_text().splitlines()
        self.data.mkdir(parents=True)
        (self.data / "test.csv").write_text((finance_table / "test.csv").read_text())
        for number, name in enumerate(sorted(small_silos.NAMES)):
            (self.data / name).mkdir()
            (self.data / name / "train.csv").write_text("\n".join([rows[0], *rows[1 + number :: 3]]) + "\n")
            self.do(
                "keys",
                f"--name={name}",
                f"--workdir={folder / name}",
                "--dataset=csv",
                "--labels=bad,good",
                *self.own(name),
            )
        self.names = sorted(small_silos.NAMES)
        cards = ",".join(str(folder / name / keys.CARD) for name in self.names)
        self.plan = folder / "coordinator" / plan.FILE
        self.do("plan", f"--sites={cards}", f"--workdir={folder / 'coordinator'}", self.model, *self.settings)
        for name in self.names:
            self.do(
                "check",
                str(self.plan),
                f"--workdir={folder / name}",
                "--most_epsilon=8",
                "--rehearsal",
                *self.own(name),
            )
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"

    def own(self, name):
        return [f"--data_dir={self.data / name}", *COLUMNS]

    def do(self, *arguments):
        before = os.umask(0)
        try:
            assert silo.main(list(arguments)) == 0
        finally:
            os.umask(before)

    def start(self, what, name=None, **user):
        """Start a process: "serve" or "relay" of a site, or "coordinate"."""
        here = self.folder / (name or "coordinator")
        if what == "serve":
            flags = [f"--workdir={here}", *self.own(name)]
        elif what == "relay":
            flags = [f"--at={self.address}", f"--socket={here / 'site.sock'}", f"--relay={here / 'relay'}"]
        else:
            approvals = ",".join(str(self.folder / name / plan.APPROVAL) for name in self.names)
            flags = [f"--workdir={here}", f"--approvals={approvals}", f"--listen={self.address}"]
            flags += [f"--test_data={self.data / 'test.csv'}", *COLUMNS, "--patience=200"]
        log = open(self.folder / f"{what}.{name}.log", "ab")  # noqa: SIM115 - the process's
        command = [sys.executable, "-m", "experiments.silo", what, str(self.plan), *flags]
        self.running[what, name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, **user)

    def kill(self, what, name=None):
        """As SIGKILL does it, and start it again."""
        process = self.running[what, name]
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.start(what, name)

    def wait(self, *keys, code=0):
        for key in keys:
            assert self.running[key].wait(SECONDS) == code, self.said()

    def said(self):
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))

    @contextlib.contextmanager
    def up(self):
        """All processes, until the context ends."""
        try:
            for name in self.names:
                self.start("serve", name)
                self.start("relay", name)
            self.start("coordinate")
            yield self
        finally:
            for process in self.running.values():
                process.kill()
                process.wait()

    def until(self, holds, what):
        end = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < end, f"{what} never came\n{self.said()}"
            time.sleep(0.01)

    def entries(self, name):
        """The kinds of entries in a site's ledger so far."""
        path = self.folder / name / "privacy_ledger.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split('"entry": "')[1].split('"')[0] for line in lines if '"entry": "' in line]

    def lines(self):
        path = self.folder / "coordinator" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def released(self):
        return np.load(self.folder / "coordinator" / "adapter.npy")

    def charged(self):
        return [Ledger(self.folder / name / "privacy_ledger.jsonl", mend=False).charged_rounds() for name in self.names]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory, tiny_bert, finance_table):
    """A run that nothing disturbed."""
    houses = Houses(tmp_path_factory.mktemp("quiet"), tiny_bert, finance_table)
    with houses.up():
        houses.wait(("coordinate", None), *(("serve", name) for name in houses.names))
    return houses


def test_three_site_processes_give_what_one_program_gives(quiet, tmp_path):
    """By the same seed, to 1e-6; and scores, reports and ledgers are there."""
    flags = [*quiet.settings, quiet.model, f"--data_dir={quiet.data}", "--partition=folders", *COLUMNS, "--clients=3"]
    flags += [f"--test_data={quiet.data / 'test.csv'}", f"--workdir={tmp_path / 'run'}"]
    whole = fit(flags)
    adapter = whole.federation.adapter
    import jax

    expected = np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(adapter)])
    np.testing.assert_allclose(quiet.released(), expected, rtol=0, atol=1e-6)
    assert [line["round"] for line in quiet.lines()] == [0, 1, 2, 3]
    for one, other in zip(quiet.lines(), whole.federation.history, strict=True):
        assert one["accuracy"] == pytest.approx(other["accuracy"])
        assert one["epsilon"] == pytest.approx(other["epsilon"], rel=1e-3)
    assert (quiet.folder / "coordinator" / "report.html").exists()
    for name in quiet.names:
        assert ledger.main(["verify", str(quiet.folder / name)]) == 0
        assert "3 rounds charged" in (quiet.folder / name / "report.html").read_text()
        assert (quiet.folder / name / "adapter" / "adapter_model.safetensors").exists()
        assert not (quiet.folder / name / "private" / "secrets.json").exists()


def test_a_sites_files_are_its_users_alone(quiet):
    for name in quiet.names:
        here = quiet.folder / name
        assert stat.S_IMODE(here.stat().st_mode) == 0o700
        for path in (path for path in (here / "private").rglob("*") if path.is_file()):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_sigkill_of_any_process_leaves_one_charge_a_round_and_the_same_adapter(
    quiet, tmp_path, tiny_bert, finance_table
):
    """A site in its step and after it, a relay, and the coordinator with its mailbox, twice."""
    houses = Houses(tmp_path / "killed", tiny_bert, finance_table)
    one, two, three = houses.names
    with houses.up():
        houses.until(lambda: "begin" in houses.entries(one), "the first charge")
        houses.kill("serve", one)
        houses.kill("relay", two)
        houses.until(lambda: len(houses.lines()) > 1, "round 1")
        houses.kill("coordinate")
        houses.until(lambda: houses.entries(two).count("commit") > 1, "a second upload")
        houses.kill("serve", two)
        houses.kill("coordinate")
        houses.until(lambda: len(houses.lines()) > 2, "round 2")
        houses.kill("serve", three)
        houses.wait(("coordinate", None), *(("serve", name) for name in houses.names))
    assert houses.charged() == [3, 3, 3]
    np.testing.assert_array_equal(houses.released(), quiet.released())


@pytest.mark.parametrize("settings", [[], MASKED])
def test_without_a_seed_a_kill_costs_an_attempt_at_the_most(tmp_path, tiny_bert, finance_table, settings):
    """What a site had not kept is lost and paid for; relay and coordinator cost nothing. Nobody pays for more than was asked,
    or for more than was planned."""
    houses = Houses(tmp_path / "killed", tiny_bert, finance_table, "--seed=none", *settings)
    one, two, _ = houses.names
    with houses.up():
        houses.until(lambda: "begin" in houses.entries(two), "the first charge")
        houses.kill("relay", two)
        houses.until(lambda: len(houses.lines()) > 1, "round 1")
        houses.kill("coordinate")
        houses.until(lambda: houses.entries(one).count("begin") > houses.entries(one).count("commit"), "a step")
        houses.kill("serve", one)
        houses.wait(("coordinate", None), *(("serve", name) for name in houses.names))
    asked = json.loads((houses.folder / "coordinator" / "asked.json").read_text())
    assert all(paid <= times for paid, times in zip(houses.charged(), asked, strict=True))
    assert max(houses.charged()) == 3
    assert houses.lines()[-1]["round"] in (2, 3)
    for name in houses.names:
        assert ledger.main(["verify", str(houses.folder / name)]) == 0
        assert sorted(path.name for path in (houses.folder / name / "private").iterdir()) == []


def test_masked_sites_come_to_an_end_and_pay_once(tmp_path, tiny_bert, finance_table):
    houses = Houses(tmp_path / "masked", tiny_bert, finance_table, *MASKED)
    with houses.up():
        houses.wait(("coordinate", None), *(("serve", name) for name in houses.names))
    assert houses.charged() == [3, 3, 3]
    assert [line["round"] for line in houses.lines()] == [0, 1, 2, 3]
    report = (houses.folder / "coordinator" / "report.html").read_text()
    assert "SIMULATED" not in report
    assert "under masks" in report


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run processes as other users")
def test_under_another_user_the_relay_reads_no_file_of_the_site(quiet, tmp_path):
    """It reaches the socket through its group, and nothing else: neither files nor the process's memory."""
    site_user, relay_user, group = 41001, 41002, 41003
    python = "/usr/bin/python3"  # which other users may start; what runs here needs no package
    if not pathlib.Path(python).exists():
        pytest.skip(f"{python} is not there")
    code = (
        "import os, pathlib, sys\n"
        "open_, failed = 0, 0\n"
        "for path in map(pathlib.Path, sys.argv[1:]):\n"
        "    try:\n        path.read_bytes(); open_ += 1\n    except PermissionError:\n        failed += 1\n"
        "print(open_, failed)\n"
    )
    here = tmp_path / "house"
    subprocess.run(["cp", "-r", quiet.folder / "north", here], check=True)
    subprocess.run(["chown", "-R", str(site_user), here], check=True)
    for folder in (tmp_path, *tmp_path.parents):
        if str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    files = [path for path in here.rglob("*") if path.is_file()]
    as_relay = {"user": relay_user, "group": relay_user, "extra_groups": [group]}
    read = subprocess.run([python, "-c", code, *map(str, files)], capture_output=True, text=True, cwd="/", **as_relay)
    assert read.stdout.split() == ["0", str(len(files))], read
    assert len(files) > 5
    serving = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from dplora_jax.silos import frames\n"
        "with frames.listening(sys.argv[2], lambda data: data[::-1], 10, sys.argv[3]):\n"
        "    print('up', flush=True); sys.stdin.read()\n"
    )
    asking = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from dplora_jax.silos import frames\n"
        "print(frames.ask(sys.argv[2], b'abc', 10, 5))\n"
    )
    run = tmp_path / "run"
    run.mkdir()
    os.chown(run, site_user, group)
    run.chmod(0o750)
    where = [str(ROOT), str(run / "site.sock")]
    with subprocess.Popen(
        [python, "-c", serving, *where, str(group)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/",
        user=site_user, group=site_user, extra_groups=[group],
    ) as server:  # fmt: skip
        assert server.stdout.readline() == b"up\n"
        told = subprocess.run([python, "-c", asking, *where], capture_output=True, text=True, cwd="/", **as_relay)
        assert told.stdout.strip() == "b'cba'", told
        other = {"user": 41004, "group": 41004, "extra_groups": []}
        refused = subprocess.run([python, "-c", asking, *where], capture_output=True, text=True, cwd="/", **other)
        assert "PermissionError" in refused.stderr
        memory = "import sys; open(f'/proc/{sys.argv[1]}/mem', 'rb')"
        peeked = subprocess.run(
            [python, "-c", memory, str(server.pid)], capture_output=True, text=True, cwd="/", **as_relay
        )
        assert "PermissionError" in peeked.stderr
        server.stdin.close()
