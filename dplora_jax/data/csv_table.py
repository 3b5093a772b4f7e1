"""CSV: rows of cells, each exactly as it stands; only the quotes around one go, and their doubles within."""

import csv
import re
import sys

from dplora_jax.data.cells import UnreadableError, refuse_twice

SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}


def read(stream, wanted, every, separators):
    """(the names of all columns, {name: cells} of those `wanted`, or of `every` one that has a name) of an open text file.

    The first of `separators` is taken whose header has the `wanted` columns. Blank lines are not rows, and a row may leave out
    its last cells. Raises UnreadableError.
    """
    limit = csv.field_size_limit(sys.maxsize)  # else a text of more than 131,072 characters is an error
    try:
        # Excel's own first line, where it must tell itself how the rest is written.
        separator_line = re.fullmatch(r"sep=(.)\s*", stream.readline())
        skipped, separators = (1, (separator_line[1],)) if separator_line else (0, separators)
        return _columns(stream, wanted, every, _separator(stream, skipped, wanted, separators), skipped)
    finally:
        csv.field_size_limit(limit)


def _rows(stream, skipped, separator):
    """The csv.reader of all that follows the first `skipped` lines."""
    stream.seek(0)
    for _ in range(skipped):
        stream.readline()
    # Without `strict`, a quote that is never closed would swallow the rest of the file in silence.
    return csv.reader(stream, delimiter=separator, strict=True)


def _header(stream, skipped, separator):
    try:
        return next(filter(None, _rows(stream, skipped, separator)), [])
    except csv.Error:
        return []


def _separator(stream, skipped, wanted, separators):
    """The separator of the file; UnreadableError that names the flag where it looks like another than `separators`."""
    wanted, headers = set(wanted), {}
    for separator in (*separators, *SEPARATORS.values()):
        headers[separator] = _header(stream, skipped, separator)
        if wanted <= set(headers[separator]) and separator in separators:
            return separator
    as_read = headers[separators[0]]
    fitting = [s for s, header in headers.items() if wanted <= set(header)]
    others = fitting or [s for s, header in headers.items() if s not in separators and len(header) > len(as_read) == 1]
    if others:
        name = {character: name for name, character in SEPARATORS.items()}[others[0]]
        raise UnreadableError(
            f"has {_columns_of(as_read)} in its header as read now, and {_columns_of(headers[others[0]])} if a {name} parts "
            f"them; give separator={name}."
        )
    return separators[0]


def _columns_of(header):
    return f"{len(header)} column{'s' * (len(header) != 1)}"


def _columns(stream, wanted, every, separator, skipped):
    reader = _rows(stream, skipped, separator)
    last = skipped  # the line at which the record before ends
    count = 0
    columns = header = None
    try:
        for row in reader:
            if row and header is None:
                header = row
                # An index that pandas wrote, or the comma that Excel leaves at the end, has no name: nobody can ask for it.
                names = [name for name in header if name.strip()]
                refuse_twice(names, names if every else wanted)
                places = {name: header.index(name) for name in names if every or name in wanted}
                columns = {name: [] for name in places}
            elif row:
                if len(row) > len(header):
                    raise UnreadableError(
                        f"has {len(row)} cells in the row that ends at line {skipped + reader.line_num}, and {len(header)} in "
                        "its header; mend it, with quotes around a text that holds the separator."
                    )
                for name, place in places.items():
                    columns[name].append(row[place] if place < len(row) else None)
                count += 1
            last = skipped + reader.line_num
    except csv.Error:
        raise UnreadableError(
            f"has a quote in the row that begins at line {last + 1} which is not closed, or is closed before its cell ends; "
            "double each quote within a quoted text."
        ) from None
    if not count:
        raise UnreadableError("has no rows; give a table with records.")
    return names, columns
