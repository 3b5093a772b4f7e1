"""What a command says and exits with when something is wrong: one sentence on stderr, and the error's code."""

import functools
import os
import sys

from dplora_jax import errors
from experiments import cli


def known(error, folder=None):
    """The InputError that `error` is or stands for, speaking of flags; None for a fault of the program. An InputError stays
    what it is, whatever it came from."""
    meant = error if isinstance(error, errors.InputError) else errors.storage(error, folder)
    if meant is not None:
        meant.args = (cli.as_flags(str(meant)), *meant.args[1:])
    return meant


def say_and_code(error, folder=None):
    """Say what `error` is, if it is one that a user can mend -> exit code; else raise it. `folder` is one whose files the command
    needs to the end."""
    what = known(error, folder)
    if what is None:
        raise error
    print(f"error: {what}", file=sys.stderr)
    return what.code


def guarded(main):
    """`main`, a command's (its arguments -> exit code), which ends with a sentence and a code where its input is wrong or its
    files, the terminal's or the pipe's included, cannot be written."""

    @functools.wraps(main)
    def run(*arguments):
        try:
            code = main(*arguments)
            sys.stdout.flush()
            return code
        except BrokenPipeError as error:  # who read what is printed has gone; at the end it would be flushed again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return say_and_code(errors.StorageError(f"the output cannot be written ({error.strerror})."))
        except Exception as error:
            return say_and_code(error)

    return run
