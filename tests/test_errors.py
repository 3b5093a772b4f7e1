"""What the machine's file system does to a command is told from a mistake of the user's, and from a fault of the program's."""

import errno
import os

import pytest

from dplora_jax import errors


@pytest.mark.parametrize("code", ["ENOSPC", "EROFS", "EACCES", "EIO", "ESTALE", "EDQUOT", "EFBIG", "ENOTCONN", "EPERM"])
def test_a_failing_file_system_is_named_with_the_file(code):
    number = getattr(errno, code)
    found = errors.storage(OSError(number, os.strerror(number), "/there/file"))
    assert found.code == 74
    assert str(found).startswith(f"/there/file cannot be read or written ({os.strerror(number)})")
    assert "\n" not in str(found)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("RESOURCE_EXHAUSTED: Error writing /there/x [tensorstore: No space left on device]"),
        RuntimeError('Error while serializing: IoError(Os { code: 122, message: "Disk quota exceeded" })'),
        RuntimeError("INTERNAL: Input/output error"),
    ],
)
def test_libraries_own_exceptions_are_told_by_their_text(error):
    assert errors.storage(error).code == 74


def test_what_caused_an_exception_counts():
    error = RuntimeError("the save thread failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/there/file")
    assert "/there/file" in str(errors.storage(error))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes"),  # the accelerator's
        KeyError("rounds"),
        OSError(errno.ENOENT, "No such file or directory", "/there/file"),
        OSError(errno.ETIMEDOUT, "Connection timed out"),  # a connection's, not a file's
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    ],
)
def test_what_is_no_file_systems_fault_is_none(error):
    assert errors.storage(error) is None


def test_a_workdir_that_is_gone_is_lost():
    gone = OSError(errno.ENOENT, "No such file or directory", "/there/run/metrics.jsonl.draft")
    assert errors.storage(gone, "/there/run").code == 74
    assert errors.storage(gone, "/elsewhere") is None
    assert errors.storage(OSError(errno.ETIMEDOUT, "Connection timed out", "/there/run/x")).code == 74
    said = errors.storage(ValueError("UNKNOWN: No space left on device"), "/there/run")
    assert str(said).startswith("a file of /there/run cannot")
