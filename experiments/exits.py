"""What a command says and exits with when something is wrong: one sentence on stderr, and the error's code."""

import functools
import sys

from dplora_jax import errors


def told(error, folder=None):
    """Say what `error` is, if it is one that a user can mend -> exit code; else raise it. `folder` is one whose files the command
    needs to the end."""
    known = error if isinstance(error, errors.InputError) else errors.storage(error, folder)
    if known is None:
        raise error
    print(f"error: {known}", file=sys.stderr)
    return known.code


def guarded(main):
    """`main`, a command's (its arguments -> exit code), which ends with a sentence and a code where its input is wrong or its
    files, the terminal's or the pipe's included, cannot be written."""

    @functools.wraps(main)
    def run(*arguments):
        try:
            code = main(*arguments)
            sys.stdout.flush()
            return code
        except Exception as error:
            return told(error)

    return run
