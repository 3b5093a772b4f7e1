"""Supervisors agree on why a run ended, whatever became of their workers. These have no JAX, and a tenth of the real times."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dplora_jax.federation import supervisor

pytestmark = pytest.mark.slow
SCRIPT = pathlib.Path(__file__).parent / "supervised.py"
ROOT = pathlib.Path(supervisor.__file__).parents[1]


def started(folder, *stories, stall=60):
    """A process for each story."""
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(number), str(len(stories)), str(folder), str(stall), *story],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for number, story in enumerate(stories)
    ]


def ends(processes):
    """{(exit code, what was said)} of all."""
    try:
        said = [process.communicate(timeout=60)[1] for process in processes]
        return {(process.returncode, words) for process, words in zip(processes, said, strict=True)}
    finally:
        for process in processes:
            process.kill()


LOST = supervisor.RESUME + "\n"
SILENT = "error: no sign of life for {:g} s from process {}, last at step 1: it died, or its host hangs. " + LOST
CASES = {
    "killed": (["step", "wait"], ["step", "KILL"], 69, f"error: process 1 was killed by SIGKILL at step 1. {LOST}"),
    "stopped": (["step", "STOP"], ["step", "wait"], 69, SILENT.format(6, 0)),
    "aborted": (["step", "wait"], ["step", "ABRT"], 69, f"error: process 1 was killed by SIGABRT at step 1. {LOST}"),
    "terminated": (
        ["wait"],
        ["step", "TERM"],
        75,
        f"stopped: process 1 was stopped by SIGTERM before a round began. {LOST}",
    ),
    "a mistake": (["step", "wait"], ["step", "2:no rank."], 2, "error: no rank.\n"),
    "a mistake that fails the other": (["step", "late:x"], ["step", "step", "65:nan."], 65, "error: nan.\n"),
    "a mistake that aborts the other": (["step", "step", "74:full."], ["step", "ABRT"], 74, "error: full.\n"),
    "a failed collective": (["step", "wait"], ["step", "late:it failed."], 1, "error: it failed.\n"),
}


@pytest.mark.parametrize("case", CASES)
def test_all_end_with_one_code_and_sentence(tmp_path, case):
    *stories, code, words = CASES[case]
    assert ends(started(tmp_path, *stories)) == {(code, words)}


@pytest.mark.parametrize("other", ["ABRT", "late:it failed.", "wait"])
def test_a_process_that_is_gone_is_named_and_not_those_that_fail_of_it(tmp_path, other):
    processes = started(tmp_path, ["step", "gone"], ["step", other], ["step", other])
    assert ends(processes[1:]) == {(69, SILENT.format(6 if other == "wait" else 3, 0))}
    processes[0].communicate()


def test_whoever_keeps_the_others_waiting_is_named_with_its_place(tmp_path):
    words = (
        "error: no progress for stall_timeout=4 s, waiting for process 1 at step 1: if that was work and no hang, give more "
        f"time. {LOST}"
    )
    assert ends(started(tmp_path, ["step", "step", "wait"], ["step", "wait"], stall=4)) == {(69, words)}


def test_a_good_end_says_nothing_and_leaves_no_file(tmp_path):
    assert ends(started(tmp_path, ["step", "leave"], ["step", "step", "leave"])) == {(0, "")}
    assert list(tmp_path.iterdir()) == []


def test_processes_that_are_suspended_together_go_on(tmp_path):
    """As by Ctrl-Z, or a cluster that suspends a job."""
    processes = started(tmp_path, ["step"] * 6 + ["leave"], ["step"] * 6 + ["leave"])
    time.sleep(3)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            os.killpg(process.pid, number)
        time.sleep(8)
    assert ends(processes) == {(0, "")}


def test_a_workdir_that_is_lost_ends_all(tmp_path):
    processes = started(tmp_path, ["step", "wait"], ["step", "wait"])
    time.sleep(2)
    for path in tmp_path.iterdir():
        path.unlink()
    ((code, words),) = {(code, words.split(" cannot")[1]) for code, words in ends(processes)}
    assert (code, words) == (74, f" be written (No such file or directory). {LOST}")
