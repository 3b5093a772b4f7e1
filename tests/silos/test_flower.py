"""Sites over Flower: a SuperLink, and a SuperNode for each site, on this machine. They need an environment that has flwr."""

import contextlib
import csv
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

from dplora_jax.privacy.ledger import FILE, Ledger
from dplora_jax.silos import frames, office_socket

ROOT = pathlib.Path(__file__).parents[2]
VENV = pathlib.Path(os.environ.get("FLOWER_VENV", sys.prefix))
NAMES, ROUNDS = ["east", "north", "south"], 2
SETTINGS = (
    "--dataset=csv", "--text_column=text", "--label_column=label", "--labels=bad,good", "--max_length=8", f"--rounds={ROUNDS}",
    "--expected_batch_size=8", "--noise_multiplier=1", "--seed=3",
)  # fmt: skip
BOUND = 540  # seconds, of a busy machine
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("flower-superlink", path=VENV / "bin"),
        reason="the extra flower is not there: set FLOWER_VENV",
    ),
]


@pytest.fixture(scope="module")
def banks(finance_table, tmp_path_factory):
    """A folder with each site's table, and the public one."""
    folder = tmp_path_factory.mktemp("banks")
    with open(finance_table / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in NAMES:
        lines = ["text,label", *(f"{row['text']},{row['label']}" for row in rows if row["bank"] == name)]
        (folder / name).mkdir()
        (folder / name / "train.csv").write_text("\n".join(lines) + "\n")
    shutil.copy(finance_table / "test.csv", folder)
    return folder


@pytest.fixture(scope="module")
def rehearse(banks, tiny_bert, tmp_path_factory):
    """Run launch/silos.sh over an engine -> (its workdir, what it said); `meanwhile(workdir)` is called while it runs."""
    cache = tmp_path_factory.mktemp("compiled")

    def run(engine, meanwhile=lambda workdir: None):
        workdir = tmp_path_factory.mktemp(engine)
        flags = "--sites=3", f"--engine={engine}", f"--data_dir={banks}", f"--workdir={workdir}", f"--model={tiny_bert}"
        command, log = ["bash", ROOT / "launch" / "silos.sh", *flags, *SETTINGS], workdir / "log"
        with open(log, "w") as out, started(command, out, JAX_COMPILATION_CACHE_DIR=str(cache)) as process:
            meanwhile(workdir)
            code = process.wait(BOUND)
        print(log.read_text()[-4000:])
        assert code == 0
        assert not running(workdir)
        return workdir, log.read_text()

    return run


@contextlib.contextmanager
def started(command, out, **variables):
    """A process with this package, as a context that ends it."""
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "FLOWER_VENV": str(VENV)} | variables
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def running(folder):
    """The processes whose command lines name `folder`, once they had time to end."""
    for _ in range(120):
        left = [
            path.parent.name
            for path in pathlib.Path("/proc").glob("[0-9]*/cmdline")
            if str(folder).encode() in read(path)
        ]
        if not left:
            break
        time.sleep(0.25)
    return left


def read(path):
    try:
        return path.read_bytes()
    except OSError:  # it is not there, or no longer
        return b""


def until(condition):
    """Wait for `condition()`."""
    end = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def expected(rehearse):
    """The adapter of a run over the mailbox, float32 [D]."""
    workdir, _ = rehearse("mailbox")
    return np.load(workdir / "coordinator" / "adapter.npy")


def check(workdir, said, expected):
    """That the run came to the adapter that was expected, and that each site paid for each of its rounds once."""
    released = np.load(workdir / "coordinator" / "adapter.npy")
    assert np.abs(expected - np.load(workdir / "coordinator" / "start.npy")).max() > 1e-3
    np.testing.assert_allclose(released, expected, rtol=1e-5, atol=1e-6)
    for name in NAMES:
        ledger = Ledger(workdir / name / FILE)
        assert ledger.ended
        assert ledger.charged_rounds() == ROUNDS
    begun = f"{ROUNDS} dispatches begun, {ROUNDS} committed; {ROUNDS} rounds charged"
    assert said.count(begun) == len(NAMES)


def test_a_run_over_flower_comes_to_the_adapter_of_the_mailbox(rehearse, expected):
    check(*rehearse("flower"), expected)


def test_a_supernode_that_is_killed_in_a_round_costs_nothing_and_changes_nothing(rehearse, expected):
    def kill(workdir):
        until(lambda: b'"entry": "begin"' in read(workdir / "north" / FILE))  # charged, and not answered yet
        os.kill(int((workdir / "flower" / "north.pid").read_text()), signal.SIGKILL)

    workdir, said = rehearse("flower", kill)
    check(workdir, said, expected)
    assert (workdir / "flower" / "north.log").read_text().count("SuperNode ID") == 2


ASK = """
import sys
import tempfile
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from dplora_jax.silos import flower_relay as relay

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 2
config = {"socket": sys.argv[1]} if len(sys.argv) > 1 else {}
context = Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={})
reply = relay.client(Message(relay.pack(b"a request"), 2, "train"), context)
assert reply.has_content(), reply.error
sys.stdout.buffer.write(relay.unpack(reply))
"""

AGAIN = """
import types
from flwr.supercore.task_identity import TaskIdentity
from dplora_jax.silos import flower_relay as relay

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

class Grid:
    came, asked = ["noon", "noon", "noon", "one"], []

    def get_nodes(self):
        return [types.SimpleNamespace(node_id=2, name="north", last_activated_at=self.came.pop(0))]

    def push_messages(self, messages):
        return ["a message"]

    def pull_messages(self, messages):
        self.asked.append(list(messages))
        return []

link = relay.Link(Grid())
assert link.ask(2, b"a request") == b""
assert Grid.asked == [["a message"]] * 2 and not Grid.came
Grid.came = ["one"]
assert link.ask(3, b"a request") == b"" and not Grid.came  # it is not there
"""


def test_a_node_that_came_again_is_not_waited_for(tmp_path):
    with (tmp_path / "log").open("w") as out, started([VENV / "bin" / "python", "-c", AGAIN], out) as process:
        code = process.wait(60)
    assert code == 0, (tmp_path / "log").read_text()


def asked(*socket):
    """The bytes of the message that a node answers with; no error, whose text would travel."""
    with tempfile.TemporaryFile() as out:
        with started([VENV / "bin" / "python", "-c", ASK, *socket], out) as process:
            assert process.wait(60) == 0
        out.seek(0)
        return out.read()


def test_a_node_answers_what_its_site_does_and_an_error_with_nothing(tmp_path):
    with frames.listening(tmp_path / "site.sock", bytes.upper, 100):
        assert asked(tmp_path / "site.sock") == b"A REQUEST"
    assert asked(tmp_path / "site.sock") == b""  # nobody is there
    assert asked() == b""  # and nothing says where


def test_a_site_that_is_away_sends_nothing_and_keeps_no_one_waiting(tmp_path):
    names, replies = ["there", "away"], ([], [])

    def office(data):
        """Asks on and on."""
        (site,) = office_socket.SITE.unpack_from(data)
        replies[site].append(data[office_socket.SITE.size :])
        return b"a request"

    for folder in ("coordinator", *names):
        (tmp_path / folder).mkdir()
    command = ["bash", ROOT / "launch" / "silos_flower.sh", "no plan", tmp_path, *names]
    with contextlib.ExitStack() as stack:
        stack.enter_context(frames.listening(tmp_path / "there" / "site.sock", bytes.upper, 100))
        stack.enter_context(frames.listening(tmp_path / "coordinator" / "office.sock", office, 100))
        out = stack.enter_context(open(tmp_path / "log", "w"))
        process = stack.enter_context(started(command, out))
        until(lambda: process.poll() is not None or min(map(len, replies)) > 2)
    print((tmp_path / "log").read_text())
    assert set(replies[0]) == {b"", b"A REQUEST"}
    assert set(replies[1]) == {b""}
    assert "Sent successfully" in (tmp_path / "flower" / "away.log").read_text()
    assert "site.sock" not in (tmp_path / "flower" / "superlink.log").read_text()
    assert not running(tmp_path)
