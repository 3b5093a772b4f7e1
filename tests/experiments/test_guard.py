"""What a command prints of others' errors, warnings and logs: their type and place, and never a record that they quote."""

import subprocess
import sys
import textwrap

import pytest

from dplora_jax import guard
from dplora_jax.errors import InputError
from experiments import audit, budget, ledger, memorisation, report, run, sweep

MARKER = "Mrs Marker's cyst"
LOUD = f'''
import logging, sys, threading, warnings
from dplora_jax.errors import InputError, InputWarning
from dplora_jax import guard
record = {MARKER!r}
guard.begin()
class Silent(Exception):
    """What a library raises."""
def fail():
    try:
        {{}}[record]
    except KeyError as error:
        raise Silent(record) from error
'''
PLACES = {
    "uncaught": "fail()",
    "uncaught in a handler": "try: int(record)\nexcept ValueError: fail()",
    "a note": "error = Silent(record); error.add_note(record); raise error",
    "interrupted in a handler": "try: int(record)\nexcept ValueError: raise KeyboardInterrupt",
    "a group": "raise ExceptionGroup(record, [Silent(record)])",
    "in a thread": "t = threading.Thread(target=fail); t.start(); t.join()",
    "in a destructor": "class Bad:\n    def __del__(self): fail()\nBad()",
    "a warning": "warnings.warn(record)",
    "a file's name": "open(record)",
}


def python(code):
    command = [sys.executable, "-c", textwrap.dedent(LOUD) + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("place", PLACES)
def test_of_what_others_raise_or_warn_of_the_type_is_shown_alone(place):
    done = python(PLACES[place])
    said = done.stdout + done.stderr
    assert said.strip()
    assert MARKER not in said


def test_where_an_error_was_raised_and_what_it_came_from_are_shown():
    said = python("fail()").stderr
    assert said.index("KeyError: what it says is withheld") < said.index("__main__.Silent: what it says is withheld")
    assert 'File "<string>", line' in said
    assert "in fail" in said


@pytest.mark.parametrize("name", ["transformers", "datasets", "pandas", "pyarrow", "absl", "orbax"])
def test_what_libraries_log_is_dropped_however_they_are_set(name):
    """Their own handlers and levels included, and what an environment asks for."""
    code = f"""
log = logging.getLogger({name!r})
log.setLevel("DEBUG")
log.addHandler(logging.StreamHandler())
log.error(record)
log.warning("Token indices sequence length is longer than %d", 1234)
try: fail()
except Silent: log.exception("failed")
"""
    done = python(code)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_our_own_sentences_and_what_the_system_says_are_shown(capsys):
    guard.show(InputError("--rank=0 must be 1 or more."))
    guard.show(OSError(28, "No space left on device", MARKER))
    guard.show(type("JaxRuntimeError", (RuntimeError,), {})(f"RESOURCE_EXHAUSTED: out of memory\n{MARKER}"))
    guard.show(type("JaxRuntimeError", (RuntimeError,), {})(f"INTERNAL: a callback failed: {MARKER}"))
    said = capsys.readouterr().err
    assert MARKER not in said
    for sentence in ("--rank=0 must be 1 or more.", "No space left on device", "RESOURCE_EXHAUSTED: out of memory"):
        assert sentence in said
    assert "warning: mind\n" in python("warnings.warn('mind', InputWarning)").stderr


def test_a_process_that_holds_secrets_writes_no_core_dump():
    """Nor may a kernel that pipes them elsewhere, to which the limit means nothing."""
    code = """
import ctypes, resource
print(resource.getrlimit(resource.RLIMIT_CORE)[0], ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))  # PR_GET_DUMPABLE
"""
    assert python(code).stdout.split()[0] == "0"
    if sys.platform == "linux":
        assert python(code).stdout.split()[1] == "0"


@pytest.mark.parametrize("command", [run, sweep, audit, memorisation, budget, ledger, report])
def test_every_command_that_may_hold_records_or_secrets_is_guarded_first(command, monkeypatch):
    class Begun(Exception):
        pass

    def begin(*_, **__):
        raise Begun

    monkeypatch.setattr(guard, "begin", begin)
    with pytest.raises(Begun):
        command.main([])
