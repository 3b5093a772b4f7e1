"""The embedded mailbox lets in the plan's sites alone, holds no frame that is too large, and forgets nobody."""

import contextlib
import os
import pathlib
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from dplora_jax.silos import engines, frames, keys, mailbox
from dplora_jax.silos.office import Office
from tests.silos import small_silos

pytestmark = pytest.mark.usefixtures("quick_compile")
HERE = "127.0.0.1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small_silos.Federation(tmp_path_factory.mktemp("mailbox"))


@contextlib.contextmanager
def served(made, office):
    with engines.mailbox(made.plan, office, (HERE, 0), made.folder / "coordinator" / "relay") as port:
        yield port


def relay_of(made, name, port, answer, stop):
    folder = made.folder / name / "relay"
    mailbox.relay(
        (HERE, port), folder / keys.TLS_KEY, folder / keys.CERTIFICATE, made.plan.coordinator["certificate"], answer,
        made.plan.request_size(), stop,
    )  # fmt: skip


def test_a_run_over_the_mailbox_is_the_run_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(mailbox, "POLL", 0.2)
    quiet = small_silos.Federation(tmp_path / "quiet").run()
    made, office, stopped = small_silos.Federation(tmp_path / "mailbox"), Office(3), threading.Event()
    with made.sites() as sites, served(made, office) as port:

        def answer(site):
            def one(request):
                with small_silos.ONE:
                    return site.handle(request)

            return one

        threads = [
            threading.Thread(target=relay_of, args=(made, name, port, answer(sites[k]), stopped.is_set), daemon=True)
            for k, name in enumerate(small_silos.NAMES)
        ]
        for thread in threads:
            thread.start()
        coordinator = made.coordinator(office)
        coordinator.run(120)
        stopped.set()
        for thread in threads:
            thread.join()
    np.testing.assert_array_equal(coordinator.state.adapter, quiet.state.adapter)


def client(folder, trusted):
    return mailbox._context(ssl.PROTOCOL_TLS_CLIENT, folder / keys.TLS_KEY, folder / keys.CERTIFICATE, [trusted])


def test_a_stranger_and_one_without_a_certificate_are_not_let_in(made, tmp_path):
    keys.create(tmp_path, "stranger", 1)
    office, trusted = Office(3), made.plan.coordinator["certificate"]
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    with served(made, office) as port:
        for context in (client(tmp_path / "relay", trusted), bare):
            with pytest.raises(OSError), socket.create_connection((HERE, port), 5) as plain:  # noqa: PT011, PT012
                plain.settimeout(5)
                with context.wrap_socket(plain) as connection:
                    frames.send(connection, b"reply")
                    if frames.receive(connection, 100) is None:
                        raise ConnectionError
        assert office.receive(0.1) is None


def test_a_mailbox_that_is_not_the_coordinators_gets_nothing(made, tmp_path):
    """A relay knows the coordinator's certificate from the plan: another's ends the handshake."""
    keys.create(tmp_path, "false", 0)
    office, got = Office(3), []
    sites = [site["certificate"] for site in made.plan.sites]
    folder, stopped = tmp_path / "relay", threading.Event()
    with mailbox.serving(office, (HERE, 0), folder / keys.TLS_KEY, folder / keys.CERTIFICATE, sites, 100) as port:
        thread = threading.Thread(target=relay_of, args=(made, "north", port, got.append, stopped.is_set), daemon=True)
        office.post(0, b"ask")
        thread.start()
        time.sleep(0.5)
        stopped.set()
        thread.join()
    assert got == []


def test_one_sites_certificate_speaks_for_that_site_alone(made, monkeypatch):
    monkeypatch.setattr(mailbox, "POLL", 0.1)
    office, folder = Office(3), made.folder / "south" / "relay"
    office.post(0, b"for north")
    office.post(1, b"for south")
    with served(made, office) as port, socket.create_connection((HERE, port), 5) as plain:
        context = client(folder, made.plan.coordinator["certificate"])
        with context.wrap_socket(plain) as connection:
            frames.send(connection, b"from south")
            assert frames.receive(connection, 100) == b"for south"
    assert office.receive(1) == (1, b"from south")


HUGE = """
import socket, threading
from dplora_jax.silos import frames
for length in (1001, 2**31, 2**32 - 1):
    left, right = socket.socketpair()
    right.settimeout(5)  # what waits for the rest of such a frame has not refused it
    threading.Thread(target=left.sendall, args=(frames.LENGTH.pack(length) + b"x" * 1000,), daemon=True).start()
    try:
        frames.receive(right, 1000)
    except frames.FrameError as error:
        print(error)
print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""


def test_a_frame_that_is_too_large_is_refused_before_it_is_held():
    out = subprocess.run([sys.executable, "-c", HUGE], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[:3] == ["a frame is too large"] * 3
    assert int(out[3]) < 100 << 10  # KiB


def test_a_frame_that_is_cut_off_is_an_error_and_an_end_is_none():
    left, right = socket.socketpair()
    left.sendall(frames.LENGTH.pack(10) + b"12345")
    left.close()
    with pytest.raises(frames.FrameError, match="cut off"):
        frames.receive(right, 100)
    left, right = socket.socketpair()
    left.close()
    assert frames.receive(right, 100) is None


def test_a_unix_socket_is_its_owners_alone_unless_a_group_is_named(tmp_path):
    for group, mode in ((None, 0o600), (os.getgid(), 0o660)):
        with frames.listening(tmp_path / "s", lambda data: data[::-1], 10, group):
            assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == mode
            assert frames.ask(tmp_path / "s", b"123", 10, 5) == b"321"
            with pytest.raises(OSError):  # noqa: PT011 - a frame that is too large ends the connection
                frames.ask(tmp_path / "s", b"x" * 11, 10, 5)
        assert not (tmp_path / "s").exists()


def test_a_slow_connection_does_not_hold_up_the_others(tmp_path):
    with frames.listening(tmp_path / "s", lambda data: data, 10), socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(tmp_path / "s"))
        slow.sendall(b"\3")
        assert frames.ask(tmp_path / "s", b"abc", 10, 5) == b"abc"


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax", "transformers"):
            raise ImportError(f"{name} must not be needed")
sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.parametrize(
    "module",
    ["experiments.silo.relay", "experiments.silo.coordinate", "experiments.silo.keys", "dplora_jax.silos.mailbox"],
)
def test_relay_and_coordinator_need_no_jax(module):
    code = f"{BLOCKER}\nimport experiments.silo, {module}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(__file__).parents[2])


def test_what_an_engine_imports_for_itself_is_the_standard_library_alone():
    """The relay of another engine lives in that engine's environment, without this project's dependencies."""
    code = "import sys; before = set(sys.modules); import dplora_jax.silos.frames; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    foreign = {name.split(".")[0] for name in run.stdout.split()} - set(sys.stdlib_module_names)
    assert foreign == {"dplora_jax"}
