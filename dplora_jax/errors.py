"""The exceptions for what a user can mend, and the warning for what a user should know: each message is one sentence, and `code`
is what a command exits with."""

import errno
import os

LONGEST = 2000  # characters of a message


class InputError(ValueError):
    """A flag, file, shape or budget is wrong; the message is one sentence that says what, where and what to do, and holds no
    value of a private record.

    What it quotes may come from a hostile file: nothing in it moves a terminal's cursor or starts a line, and it has an end."""

    code = 2

    def __init__(self, message):
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST - 400]} [...] {text[-400:]}")


class Refused(InputError):
    """A refusal whose `reason` tells something of private records, and is for their owner alone; the message is for all."""

    def __init__(self, message, reason):
        super().__init__(message)
        self.reason = reason


class InputWarning(UserWarning):
    """One sentence that a user should know, which holds no value of a private record."""


class NotFiniteError(InputError):
    """Training has come to numbers that are not finite, and would only spend the budget; what is saved stays."""

    code = 65  # EX_DATAERR of sysexits.h


class StorageError(InputError):
    """A file cannot be read or written though nothing is wrong with it: the disk is full, the folder read-only or gone."""

    code = 74  # EX_IOERR


def unreadable(error, message):
    """The InputError `message` about an exception that came of reading a file; a StorageError where the machine is at fault."""
    return (StorageError if storage(error) else InputError)(message)


# A disk that is full or broken, a folder that may not be written, a network's folder that is lost.
FAILURES = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN,
    errno.EREMOTEIO, errno.EMFILE, errno.ENFILE,
)  # fmt: skip
OF_FILES = (
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENODEV,
    errno.ENXIO,
)  # of others, where a file is named


def storage(error, folder=None):
    """The StorageError that an exception stands for, itself or by what caused it, or None.

    Libraries that write files (orbax, tensorstore, safetensors, XLA) have exceptions of their own, whose text tells. A file of
    `folder` that is not there any more is one too: the folder was lost.
    """
    while error is not None:
        reason = where = None
        if isinstance(error, StorageError):
            return error
        if isinstance(error, OSError):
            where, reason = error.filename, error.strerror
            lost = error.errno == errno.ENOENT and folder and str(where).startswith(str(folder))
            if not (error.errno in FAILURES or (where and error.errno in OF_FILES) or lost):
                reason = None
        else:
            reason = next((text for text in map(os.strerror, FAILURES) if text in str(error)), None)
        if reason:
            what = where or (f"a file of {folder}" if folder else "a file")
            return StorageError(
                f"{what} cannot be read or written ({reason}): what was saved stays; mend that, and run the same command again."
            )
        error = error.__cause__ or error.__context__
    return None
