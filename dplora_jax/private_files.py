"""Files of what is exact of private records, statistics and the reasons of refusals: they say what they are, and are their
owner's alone from the moment they are made."""

import contextlib
import os
import pathlib

from dplora_jax.errors import Refused
from dplora_jax.files import to_json
from dplora_jax.privacy.chain import replace_durably

MODE, FOLDER_MODE = 0o600, 0o700
REASON = "refused.json"
NOTE = "PRIVATE: exact, of the records themselves, outside the guarantee; NOT FOR RELEASE"


def write(path, document):
    """Replace the JSON file `path`, as one step, by `document` (a dict) behind the note."""
    replace_durably(path, to_json({"note": NOTE} | document, indent=1) + "\n", MODE)


def open_to_append(path):
    """The text file `path`, to write at its end."""
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, MODE)
    os.fchmod(number, MODE)  # an older file may be open to others
    return open(number, "a", encoding="utf-8")


@contextlib.contextmanager
def reasons_in(folder):
    """Where a Refused passes, put its reason into `folder`/private, and that it is there behind its message."""
    try:
        yield
    except Refused as error:
        private = pathlib.Path(folder) / "private"
        private.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        write(private / REASON, {"reason": error.reason})
        error.args = (f"{str(error).rstrip('.')}; why is in {private / REASON}, for the records' owner alone.",)
        raise
