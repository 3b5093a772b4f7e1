"""NVFLARE as the engine, where NVFLARE_VENV says where nvflare is."""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dplora_jax.privacy.ledger import Ledger
from dplora_jax.silos import frames, office_socket
from tests.conftest import write_bert, write_table
from tests.silos import nvflare_edits

ROOT = pathlib.Path(__file__).parents[2]
VENV = os.environ.get("NVFLARE_VENV")
NAMES = "east", "north", "south"
with_nvflare = [
    pytest.mark.slow,
    pytest.mark.skipif(not VENV, reason="the extra nvflare is not there: set NVFLARE_VENV"),
]


# The real thing


@contextlib.contextmanager
def engine(workdir, files=nvflare_edits.FILES):
    """launch/silos_nvflare.sh on `workdir` -> its log's path; nothing that it started is left."""
    log = workdir / "nvflare.log"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NVFLARE_FILES": str(files)}
    command = [ROOT / "launch" / "silos_nvflare.sh", workdir / "coordinator" / "plan.json", workdir, *NAMES]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield log
        finally:
            process.terminate()
            process.wait(60)
    assert not running(workdir)


def running(workdir):
    """Command lines of NVFLARE's processes on `workdir`."""
    return [line for line in commands() if str(workdir) in line and "nvflare.private" in line]


def commands():
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace")


def until(condition, seconds, what):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come within {seconds} s"
        time.sleep(0.5)


@contextlib.contextmanager
def stand_ins(workdir, rounds):
    """An office with so many requests for each site, and the sites' processes -> {site's number: replies that came}."""
    replies = collections.defaultdict(list)
    (workdir / "coordinator").mkdir(parents=True)
    plan = {"plan": {"sites": [{"name": name} for name in NAMES]}}
    (workdir / "coordinator" / "plan.json").write_text(json.dumps(plan))

    def office(data):
        (site,), reply = office_socket.SITE.unpack_from(data), data[office_socket.SITE.size :]
        if reply and reply not in replies[site]:
            replies[site].append(reply)
        if len(replies[site]) == rounds:
            time.sleep(1)
            return b""
        return b"request %d of %d" % (len(replies[site]), site)

    with contextlib.ExitStack() as stack:
        stack.enter_context(frames.listening(workdir / "coordinator" / "office.sock", office, 1 << 10))
        for name in NAMES:
            (workdir / name).mkdir()
            answer = lambda data: hashlib.sha256(data).digest()  # noqa: E731
            stack.enter_context(frames.listening(workdir / name / "site.sock", answer, 1 << 10))
        yield replies


def kits(workdir):
    return workdir / "nvflare" / "made" / "dplora_jax" / "prod_00"


class TestNvflare:
    pytestmark = with_nvflare

    @pytest.mark.parametrize(
        ("edit", "refusal"),
        [
            (nvflare_edits.own_code, "BYOC not permitted"),
            (nvflare_edits.own_code_of_a_super_user, "the job has files of its own: custom/own.py"),
            (nvflare_edits.other_class, "the job's configuration is another than this site runs"),
            (nvflare_edits.other_class_without_launcher, "is not in allow_list"),
        ],
    )
    def test_a_site_refuses_code_of_a_job_and_a_class_that_is_not_listed(self, tmp_path, edit, refusal):
        files, workdir = nvflare_edits.copied(tmp_path, edit), tmp_path / "run"

        def refused():
            site = "".join(path.read_text(errors="replace") for path in kits(workdir).glob("north/**/*.txt"))
            return refusal in site or refusal in (workdir / "nvflare.log").read_text(errors="replace")

        with stand_ins(workdir, 1) as replies, engine(workdir, files):
            until(refused, 240, refusal)
        assert not any(replies.values())

    @pytest.mark.parametrize(
        "uploads", [False, True], ids=["by our files", "by NVFLARE's own, which this would notice"]
    )
    def test_no_line_of_a_sites_log_reaches_the_server(self, tmp_path, uploads):
        workdir, marker = tmp_path / "run", "a line of this site alone"
        files = nvflare_edits.copied(tmp_path, nvflare_edits.uploading) if uploads else nvflare_edits.FILES

        def logs():
            return [path for name in NAMES for path in kits(workdir).glob(f"{name}/*/*log*.txt")]

        with contextlib.ExitStack() as stack:
            with stand_ins(workdir, 30) as replies:
                log = stack.enter_context(engine(workdir, files))
                until(lambda: len(replies) == 3, 240, "a reply of each site")
                for name in NAMES:
                    (job,) = kits(workdir).glob(f"{name}/*-*-*")
                    for file in ("log.txt", "error_log.txt"):
                        with (job / file).open("a") as out:
                            out.write(f"2026-01-01 00:00:00,000 - SiteRelay - ERROR - {marker} {name}\n")
                until(lambda: all(len(replies[site]) == 30 for site in range(3)), 240, "thirty replies of each site")
            until(lambda: "FINISHED:COMPLETED" in log.read_text(errors="replace"), 180, "the end of the job")
            time.sleep(5)  # in which a log would be uploaded
            server = [path for path in kits(workdir).glob("localhost/**/*") if path.is_file()]
            server += [path for path in (workdir / "nvflare" / "store").rglob("*") if path.is_file()]
            assert any(marker in path.read_text(errors="replace") for path in logs())
            assert len(server) > 10
            assert bool([path for path in server if marker.encode() in path.read_bytes()]) is uploads

    def test_it_goes_on_after_the_server_was_killed(self, tmp_path):
        workdir = tmp_path / "run"

        def came(count):
            return all(len(replies[site]) >= count for site in range(len(NAMES)))

        with stand_ins(workdir, 20) as replies, engine(workdir):
            until(lambda: came(3), 400, "three replies of each site")
            os.kill(int((kits(workdir) / "localhost" / "pid.fl").read_text()), signal.SIGKILL)
            assert not came(20)
            until(lambda: came(20), 400, "the other replies")


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    """A folder with a tiny model, three sites' tables and a public one."""
    folder = tmp_path_factory.mktemp("banks")
    for name in ("model", "table"):
        (folder / name).mkdir()
    write_bert(folder / "model")
    write_table(folder / "table")
    rows = [line.split(",") for line in (folder / "table" / "train.csv").read_text().splitlines()[1:]]
    for name in NAMES:
        (folder / "banks" / name).mkdir(parents=True)
        lines = ["text,label", *(f"{text},{label}" for text, label, bank in rows if bank == name)]
        (folder / "banks" / name / "train.csv").write_text("\n".join(lines) + "\n")
    shutil.copy(folder / "table" / "test.csv", folder / "banks" / "test.csv")
    return folder


def federation(banks, workdir, engine, act=lambda: None):
    """The adapter of a whole run by launch/silos.sh over `engine`; `act()` is called after round 1."""
    command = [
        ROOT / "launch" / "silos.sh", f"--data_dir={banks / 'banks'}", f"--workdir={workdir}", f"--engine={engine}",
        f"--model={banks / 'model'}", "--dataset=csv", "--text_column=text", "--label_column=label", "--labels=bad,good",
        "--max_length=8", "--noise_multiplier=1", "--expected_batch_size=8", "--rank=2", "--rounds=4", "--seed=3",
    ]  # fmt: skip
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
    workdir.mkdir()
    with (workdir / "run.log").open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        metrics = workdir / "coordinator" / "metrics.jsonl"
        try:
            until(
                lambda: process.poll() or (metrics.exists() and len(metrics.read_text().splitlines()) > 1),
                900,
                "round 1",
            )
            act()
            assert process.wait(900) == 0, (workdir / "run.log").read_text()
        finally:
            process.terminate()
    for name in NAMES:
        assert Ledger(workdir / name / "privacy_ledger.jsonl").charged_rounds() == 4
    return np.load(workdir / "coordinator" / "adapter.npy")


@pytest.fixture(scope="module")
def expected(banks, tmp_path_factory):
    """The adapter that the same run comes to over the mailbox."""
    return federation(banks, tmp_path_factory.mktemp("runs") / "mailbox", "mailbox")


class TestWholeRuns:
    pytestmark = with_nvflare

    def test_a_run_comes_to_the_adapter_that_the_mailbox_gives(self, banks, expected, tmp_path):
        np.testing.assert_array_equal(federation(banks, tmp_path / "run", "nvflare"), expected)
        until(lambda: not running(tmp_path), 30, "the end of all processes")

    def test_with_a_client_killed_in_a_round_all_are_charged_once_and_the_run_ends_alike(
        self, banks, expected, tmp_path
    ):
        workdir = tmp_path / "run"

        def kill():
            os.kill(int((kits(workdir) / "north" / "pid.fl").read_text()), signal.SIGKILL)

        np.testing.assert_array_equal(federation(banks, workdir, "nvflare", kill), expected)
        for name in NAMES:
            ledger = [json.loads(line) for line in (workdir / name / "privacy_ledger.jsonl").read_text().splitlines()]
            assert sum(entry.get("entry") == "begin" for entry in ledger) == 4
