"""What passes between processes: nothing of a record, no key twice, and no port where none was named."""

import socket
import threading
import types

import pytest

from dplora_jax.config import RunConfig
from dplora_jax.errors import InputError, Refused
from dplora_jax.federation import dispatch, processes, watch
from experiments import cli

MARKER = "Mrs Marker's cyst"


class Ended(Exception):
    pass


@pytest.fixture
def group(monkeypatch):
    """This process as number 1 of two, that ends as `Ended(code, sentence)`."""
    made = watch.Group(None, 1, 2, 100.0, "here:1")

    def end(_, code, sentence):
        raise Ended(code, sentence)

    monkeypatch.setattr(processes, "_group", made)
    monkeypatch.setattr(watch, "end", end)
    monkeypatch.setattr(watch, "silent", lambda _: [])
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
    draw = lambda: dispatch.agreed_charge(types.SimpleNamespace(config=cli.RunConfig()), 0)  # noqa: E731
    assert draw() == ((1, 3), 0, "first")
    assert draw() == ((3, 5), 0, "second")
    assert draw() is None
    with pytest.raises(InputError, match="names a ledger entry for a second dispatch"):
        draw()


@pytest.mark.parametrize("coordinator", ["127.0.0.1", "auto"])
def test_process_0_listens_at_the_named_address_alone(coordinator, monkeypatch):
    """JAX alone would listen at every address of the machine, and asks nobody who he is. 127.0.0.2 stands for another network."""
    import jax
    from jax._src import distributed
    from jax._src.lib import _jax

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    services = []

    def initialize(**options):
        distributed.global_state.coordinator_address = f"127.0.0.1:{port}"  # as JAX finds it, or was told
        address = options.get("coordinator_bind_address") or f"[::]:{port}"
        services.append(_jax.get_distributed_runtime_service(address, 1))
        raise RuntimeError("far enough")

    def leave(code):
        raise Ended(code)

    before = _jax.get_distributed_runtime_service, distributed.global_state.coordinator_address
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(watch, "leave_at_once", leave)
    where = coordinator if coordinator == "auto" else f"{coordinator}:{port}"
    try:
        with pytest.raises(Ended):
            processes.join(cli.replace(RunConfig(), coordinator=where, processes=1, process=0))
        socket.create_connection(("127.0.0.1", port), 5).close()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", port), 5).close()
        assert _jax.get_distributed_runtime_service is before[0]
    finally:
        distributed.global_state.coordinator_address = before[1]
        for service in services:
            threading.Thread(target=service.shutdown, daemon=True).start()
