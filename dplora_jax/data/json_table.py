"""JSON lines, and JSON files that are one list: strings as they are, numbers as they are written."""

import json

from dplora_jax.data.cells import UnreadableError

WORDS = {True: "true", False: "false"}


def read(stream, wanted, every):
    """(the names of all columns, {name: cells} of those `wanted`, or of `every` one) of an open text file.

    A missing key, null and NaN are missing values. Raises UnreadableError.
    """
    names, columns, count = {}, {name: [] for name in wanted}, 0
    for count, (where, row) in enumerate(_rows(stream), start=1):
        if not isinstance(row, dict):
            raise UnreadableError(f'has no object at {where}; give one a line, {{"text": "..."}}, or one list of them.')
        for name in row:
            names[name] = None
            if every and name not in columns:
                columns[name] = [None] * (count - 1)
        for name, column in columns.items():
            column.append(_cell(row.get(name)))
    if not count:
        raise UnreadableError("has no rows; give a table with records.")
    return list(names), {name: column for name, column in columns.items() if name in names}


def _rows(stream):
    """(where it stands, what it says) of each row."""
    first = next((line for line in stream if line.strip()), "")
    stream.seek(0)
    if first.lstrip().startswith("["):
        rows = _parsed(stream.read(), "")
        for number, row in enumerate(rows, start=1):
            yield f"row {number}", {"text": row} if isinstance(row, str) else row
    else:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"line {number}", _parsed(line, f" at line {number}")


def _parsed(text, where):
    try:
        return DECODER.decode(text.strip())
    except _TwiceError:
        problem = f"names a key of an object twice{where}; rename one of them."
    except (json.JSONDecodeError, RecursionError):
        problem = f"is not JSON{where}; give one whole object a line, or one list of objects."
    raise UnreadableError(problem)


class _TwiceError(Exception):
    """An object has two values of one key."""


def _once(pairs):
    object_values = dict(pairs)
    if len(object_values) < len(pairs):
        raise _TwiceError
    return object_values


# Numbers stay as they are written: 007 and 1e5 are somebody's words, and Python reads no number of five thousand digits.
DECODER = json.JSONDecoder(
    parse_int=str,
    parse_float=str,
    parse_constant=lambda word: None if word == "NaN" else word,
    strict=False,  # a tab within a string is its writer's
    object_pairs_hook=_once,
)


def _cell(value):
    return WORDS[value] if isinstance(value, bool) else value
