"""What the readers of tables share: what a cell may be, and how they say what is wrong.

A cell is a string, exactly as the file holds it, and None where nothing stands there. In a file with types, what is not a string
becomes one where there is only one way to write it: whole numbers, dates, true and false (in JSON any number, as it stands).
All else stays what it is, and `records.rows` refuses it where a text is wanted.
"""

from dataclasses import dataclass


class UnreadableError(Exception):
    """Why a table cannot be read: a sentence whose subject is its file, without a word of a record."""


@dataclass(frozen=True)
class NoText:
    """A cell of a `kind` that has no one way of being written as text."""

    kind: str


def refuse_twice(names, wanted):
    """UnreadableError where one of `wanted` is the name of two columns of `names`: nothing says which is meant."""
    for name in wanted:
        if names.count(name) > 1:
            raise UnreadableError(f"has two columns named '{name}'; rename one of them.")
