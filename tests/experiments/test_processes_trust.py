"""What passes between processes: nothing of a record, no key twice, and no port where none was named."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import types

import pytest

from dplora_jax.config import RunConfig, replace
from dplora_jax.errors import InputError, Refused
from dplora_jax.federation import dispatch, processes, supervisor

MARKER = "Mrs Marker's cyst"


class Ended(Exception):
    pass


@pytest.fixture
def group(monkeypatch):
    """This process as number 1 of two, that ends as `Ended(code, sentence)`."""
    made = processes.Group(types.SimpleNamespace(send=lambda _: None), 1, 2)
    made.name = "process 1"

    def end(code, sentence, _):
        raise Ended(code, sentence)

    monkeypatch.setattr(processes, "_group", made)
    monkeypatch.setattr(processes, "_fail", end)
    return made


def failed(error):
    """What the others are told of an error: (code, sentence)."""
    try:
        try:
            raise error from ValueError(MARKER)
        except Exception as caught:
            processes.fail(caught)
    except Ended as ended:
        return ended.args


@pytest.mark.parametrize("error", [KeyError(MARKER), RuntimeError(f"cannot parse {MARKER}"), UnicodeError(MARKER)])
def test_of_a_fault_at_one_process_no_record_reaches_its_log_or_another_process(group, error, capsys):
    code, sentence = failed(error)
    said = capsys.readouterr()
    assert (code, MARKER in sentence + said.out + said.err) == (1, False)
    assert type(error).__name__ in sentence
    assert 'test_processes_trust.py", line' in said.err


def test_the_others_are_not_told_whose_client_a_test_set_holds(group, capsys):
    assert failed(InputError("--rank=0.")) == (2, "process 1: --rank=0.")
    code, sentence = failed(Refused("the test table is refused.", f"it holds {MARKER}"))
    assert (code, sentence) == (2, "the test table is refused.")
    assert MARKER not in "".join(capsys.readouterr())


def test_a_process_draws_from_one_ledger_entry_once(group, monkeypatch):
    """A process 0 that names an entry again, for the same rounds or others, would have their noise cancel."""
    told = iter([[[1, 3], 0, "first"], [[3, 5], 0, "second"], None, [[1, 4], 1, "first"]])
    monkeypatch.setattr(processes, "gather", lambda _: [next(told)])
    draw = lambda: dispatch.agreed_charge(types.SimpleNamespace(config=RunConfig()), 0)  # noqa: E731
    assert draw() == ((1, 3), 0, "first")
    assert draw() == ((3, 5), 0, "second")
    assert draw() is None
    with pytest.raises(InputError, match="names a ledger entry for a second dispatch"):
        draw()


def test_whom_jax_aborts_before_all_have_come_is_told_to_start_all():
    """JAX may abort a process that waited for the others in vain, before it can say so itself."""
    config = replace(RunConfig(), coordinator="127.0.0.1:61440", processes=2, process=1, stall_timeout=10.0)
    waiting = supervisor.Supervisor(0, None, 10.0, f"{processes._alone(config)}.")
    waiting._on_exit(-signal.SIGABRT)
    _, code, sentence = waiting.failure
    assert code == supervisor.LOST
    assert "process 1 could not join the others" in sentence
    assert "start all 2 processes" in sentence


LISTEN = """
import socket, sys
from dplora_jax.federation import processes
socket.gethostname = lambda: "127.0.0.1"  # as process 0's host is known to the cluster
import jax
alone = {} if sys.argv[1] == "auto" else {"num_processes": 1, "process_id": 0}
jax.distributed.initialize(**processes.addresses(sys.argv[1]), **alone)
print("listens", flush=True)
input()
"""
SLURM = {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize("coordinator", ["127.0.0.1", "auto"])
def test_process_0_listens_at_the_named_address_alone(coordinator):
    """JAX alone would listen at every address of the machine, and asks nobody who he is. 127.0.0.2 stands for another network."""
    job = os.getpid() % 4096
    port, where = 61440 + job, coordinator
    if coordinator != "auto":
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        where = f"{coordinator}:{port}"
    root = pathlib.Path(processes.__file__).parents[1]
    listener = subprocess.Popen(
        [sys.executable, "-c", LISTEN, where],
        env=os.environ | SLURM | {"SLURM_JOB_ID": str(job), "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert listener.stdout.readline() == b"listens\n"
        socket.create_connection(("127.0.0.1", port), 5).close()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", port), 5).close()
    finally:
        listener.kill()
        listener.communicate()
