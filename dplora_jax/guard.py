"""What a command owes the records and secrets in its memory: no core dump, and nothing of others' text in what it prints.

This project's own errors and warnings hold no value of a record. Others' may quote one, a chat template's, a tokenizer's, a
parser's, even a KeyError's: of those the type is printed, and where it was raised, never what it says.
"""

import ctypes
import logging
import os
import resource
import sys
import threading
import traceback
import warnings

from dplora_jax.errors import InputError, InputWarning

WITHHELD = "what it says is withheld, since it may quote a record"
QUIET = {"TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
PR_SET_DUMPABLE = 4  # of Linux' prctl


def begin(speaks=lambda: True, phrase=str):
    """To be called first by a command that holds records or secrets, for the rest of its process: what libraries log is dropped,
    and their warnings and uncaught exceptions are shown by type and place alone. Warnings are shown where `speaks()`, and this
    project's own as `phrase(message)` puts them."""
    _dump_no_core()
    os.environ |= QUIET
    logging.disable(logging.CRITICAL)
    warnings.showwarning = lambda *args: speaks() and _show_warning(phrase, *args)
    sys.excepthook = lambda _, error, __: show(error)
    threading.excepthook = sys.unraisablehook = lambda raised: raised.exc_value is not None and show(raised.exc_value)


def _dump_no_core():
    """No image of this process's memory is written, whatever it dies of, nor may another process of this user's read it.

    A limit of 0 stops a kernel that writes core files itself; one that pipes them to a program (systemd-coredump, apport) does
    not heed it, and there Linux must be told that the process is not to be dumped.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def show(error):
    """Print where `error` and what it came from were raised, and their types, to stderr."""
    chain = [error]
    while (before := _before(chain[-1])) is not None and before not in chain:
        chain.append(before)
    for one in reversed(chain):
        place = traceback.format_tb(one.__traceback__)
        print(*place, _name(type(one)), ": " if one.args else "", _said(one), sep="", file=sys.stderr)


def _before(error):
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _said(error):
    """What may be printed of an exception: our own sentences, and what the system says of a disk or of memory."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    text = str(error) if type(error).__name__ == "JaxRuntimeError" else ""
    if text.startswith("RESOURCE_EXHAUSTED"):
        return text.splitlines()[0]
    return WITHHELD if error.args else ""


def _show_warning(phrase, message, category, filename, line, *_):
    ours = isinstance(message, InputWarning)
    print(
        f"warning: {phrase(message) if ours else f'{_name(category)} at {filename}:{line} ({WITHHELD})'}",
        file=sys.stderr,
    )


def _name(kind):
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
