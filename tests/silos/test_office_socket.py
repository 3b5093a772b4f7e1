"""What an engine needs of this package: it works without any of the project's dependencies, and loses no request."""

import concurrent.futures
import os
import stat
import subprocess
import sys
import threading
import types

import pytest

from dplora_jax.silos import engines, frames, office_socket
from dplora_jax.silos.office import Office

ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jax", "jaxlib", "numpy", "cryptography", "absl", "flax"):
            raise ImportError(f"{name} is not for a relay")

sys.meta_path.insert(0, Blocked())
from dplora_jax.silos import frames, office_socket
print(*sorted(name for name in sys.modules if name.startswith("dplora_jax")))
"""
REQUEST = bytes(100)


def test_a_relay_imports_pythons_own_library_alone():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    own = ("dplora_jax", "dplora_jax.silos", "dplora_jax.silos.frames", "dplora_jax.silos.office_socket")
    assert done.stdout.split() == list(own)


def test_a_request_is_given_again_until_it_is_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(office_socket, "PAUSE", 0.01)
    office, path, asked, answers = Office(2), tmp_path / "office.sock", [], [b"", b"", b"a reply"]
    office.post(1, REQUEST)

    def answer(data):
        site = office_socket.SITE.unpack_from(data)[0]
        return office.exchange(site, data[office_socket.SITE.size :], 0.05)

    def ask(request):
        asked.append(request)
        return answers[len(asked) - 1]

    with frames.listening(path, answer, 1000):
        office_socket.carry(path, 1, ask, stop=lambda: len(asked) == len(answers))
        assert asked == [REQUEST] * 3
        assert office.receive(0) is None
        office_socket.exchange(path, 1, answers[-1])
    assert office.receive(0) == (1, b"a reply")


def test_what_does_not_reach_the_office_is_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.setattr(office_socket, "PAUSE", 0.01)
    path, left, answers = tmp_path / "office.sock", [], [bytes(2000), b"a reply"]  # the first is too large

    def answer(data):
        left.append(data[office_socket.SITE.size :])
        return REQUEST

    with frames.listening(path, answer, 1000):
        office_socket.carry(path, 0, lambda request: answers.pop(0), stop=lambda: not answers)
        office_socket.exchange(path, 0, b"a reply")
    office_socket.carry(path, 0, None, stop=iter([False, True]).__next__)  # nobody listens, and nothing is raised
    assert left == [b"", b"", b"a reply"]


def test_an_office_that_stays_away_ends_it_where_patience_does(tmp_path, monkeypatch):
    monkeypatch.setattr(office_socket, "PAUSE", 0.01)
    told = []
    office_socket.carry(tmp_path / "office.sock", 0, None, patience=0.05, say=told.append)
    assert len(told) > 1
    assert "trying again (FileNotFoundError" in told[0]


@pytest.mark.parametrize(("group", "mode"), [(None, 0o600), (os.getgid(), 0o660)])
def test_the_office_is_for_its_user_and_the_engines_group(tmp_path, group, mode):
    plan, path = types.SimpleNamespace(sites=[None], reply_size=lambda: 100), tmp_path / "office.sock"
    with engines.socket(plan, Office(1), path, group):
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert frames.ask(path, b"\1\0", 100) == b""  # there is no such site


def test_the_questions_of_all_sites_may_wait_at_once(tmp_path):
    sites = 3 * frames.THREADS
    everyone = threading.Barrier(sites)

    def exchange(site, reply, seconds):
        everyone.wait(20)
        return b"request of %d after %s" % (site, reply)

    plan, path = types.SimpleNamespace(sites=range(sites), reply_size=lambda: 16), tmp_path / "office.sock"
    ask = lambda site: frames.ask(path, office_socket.SITE.pack(site) + b"reply", 64, 30)  # noqa: E731
    with (
        engines.socket(plan, types.SimpleNamespace(exchange=exchange), path),
        concurrent.futures.ThreadPoolExecutor(sites) as pool,
    ):
        assert list(pool.map(ask, range(sites))) == [b"request of %d after reply" % site for site in range(sites)]
