"""What an engine needs of this package: it works without any of the project's dependencies, and loses no request."""

import subprocess
import sys

from dplora_jax.silos import frames, office_socket
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


def test_a_reply_waits_while_the_office_is_away(tmp_path, monkeypatch):
    monkeypatch.setattr(office_socket, "PAUSE", 0.01)
    path, left = tmp_path / "office.sock", []
    exchange = office_socket.exchange

    def away_twice(path, site, reply):
        left.append(reply)
        if left.count(b"a reply") in (1, 2):
            raise ConnectionRefusedError
        return exchange(path, site, reply)

    monkeypatch.setattr(office_socket, "exchange", away_twice)
    with frames.listening(path, lambda data: REQUEST if len(left) == 1 else b"", 1000):
        office_socket.carry(path, 0, lambda request: b"a reply", stop=lambda: len(left) == 5)
    assert left == [b"", b"a reply", b"a reply", b"a reply", b""]
