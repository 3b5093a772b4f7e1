"""Reads a table from the very file that was found: opened once, by its path, by nothing that takes a path for a pattern.

Every cell is what the file holds (`cells`). No copy is made on disk, and no message holds text of a record.
"""

import codecs
import gzip
import io
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dplora_jax.data import csv_table, json_table
from dplora_jax.data.cells import UnreadableError
from dplora_jax.errors import InputError, unreadable

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")  # all but .parquet also with .gz behind them
MARKS = {  # byte-order marks; the longer ones first, since one begins as another does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# How files begin that are something else than their name says.
OTHERS = {
    b"PK\x03\x04": "is a zip archive or an Excel workbook",
    b"\xd0\xcf\x11\xe0": "is an Excel workbook",
    b"PAR1\x15": "is a Parquet file",
    b"BZh91AY&SY": "is compressed by bzip2",
    b"\xfd7zXZ\x00": "is compressed by xz",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd",
    b"version https://git-lfs.": "is a Git LFS pointer, not the file (git lfs pull fetches it)",
}


class Table(NamedTuple):
    """The columns of a table that were asked for, each a list with one cell a row.

    `where` is what messages call it, and `names` are those of all its columns."""

    where: str
    names: list[str]
    columns: dict[str, list]


@dataclass(frozen=True)
class TextFormat:
    """How text files are written that are not UTF-8, or part their cells by something else; None: nothing was said."""

    encoding: str | None = None
    separator: str | None = None


PLAIN = TextFormat()


def text_format(encoding: str | None, separator: str | None) -> TextFormat:
    """The TextFormat of two fields; InputError where one means nothing."""
    if encoding is not None:
        try:
            "".encode(encoding).decode(encoding)
        except (LookupError, UnicodeError):
            raise InputError(
                f"encoding={encoding} is not known; write utf-16, cp1252, or as Python calls it."
            ) from None
    separator = csv_table.SEPARATORS.get(separator, "\t" if separator == r"\t" else separator)
    if separator is not None and (len(separator) != 1 or separator in '"\r\n'):
        words = ", ".join(csv_table.SEPARATORS)
        raise InputError(f"separator={separator} is not a separator; write {words}, or one character.")
    return TextFormat(encoding, separator)


def suffix_of(path: Path) -> str | None:
    """Which of SUFFIXES a file has, .gz behind it or not; None if none."""
    whole = path.name.lower()
    name = whole.removesuffix(".gz")
    return next((s for s in SUFFIXES if name.endswith(s) and not (s == ".parquet" and name != whole)), None)


def stem_of(path: Path) -> str:
    """A table's name without what `suffix_of` finds."""
    name = path.with_suffix("").name if path.suffix.lower() == ".gz" else path.name
    return name[: len(name) - len(suffix_of(path) or Path(name).suffix)]


def find(folder: str, stem: str, suffixes: Collection[str]) -> Path | None:
    """The file of that stem with one of the suffixes, or None; InputError where there are two, or no such folder."""
    root = Path(folder)
    zipped = [suffix + ".gz" for suffix in suffixes if suffix != ".parquet"]
    try:
        if not root.is_dir():
            raise InputError(f"data_dir={folder} is not a folder; give the folder that holds the tables.")
        paths = [root / (stem + suffix) for suffix in (*suffixes, *zipped) if (root / (stem + suffix)).is_file()]
    except OSError as error:
        raise unreadable(error, f"{folder} cannot be read ({error.strerror}); let this process read it.") from None
    if len(paths) > 1:
        raise InputError(f"{folder} has more than one {stem} table ({', '.join(p.name for p in paths)}); keep one.")
    return paths[0] if paths else None


def read_file(path: Path, wanted: Collection[str], every: bool = False, form: TextFormat = PLAIN) -> Table:
    """The Table of a CSV, JSON-lines, JSON, Parquet or text file (its lines are its column "text").

    Its columns are those `wanted` that it has, or `every` one. Raises InputError.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise InputError(f"{path} is of no known kind; give one of {', '.join(SUFFIXES)} (or .gz of a text file).")
    try:
        if not path.is_file():
            raise UnreadableError("is not there; give the path of a table.")
        with path.open("rb") as file:
            return Table(str(path), *_read(file, suffix, wanted, every, form))
    except UnreadableError as error:
        problem = InputError(f"{path} {error}")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        problem = unreadable(error, f"{path} cannot be read ({reason}); see to it that this process can read it.")
    # Raised outside the handlers, so that not even the error's context holds what a parser quoted of a record.
    raise problem


def _read(file, suffix, wanted, every, form):
    head = file.peek(64)
    if not head:
        raise UnreadableError("is empty; give a table with records.")
    if suffix == ".parquet" and head.startswith(b"PAR1"):
        return _read_parquet(file, wanted, every)
    for mark, what in OTHERS.items():
        if head.startswith(mark):
            raise UnreadableError(f"{what}; give it as what its name says, {suffix}.")
    if suffix == ".parquet":
        raise UnreadableError("does not begin as a Parquet file does; write it anew.")
    if not head.startswith(b"\x1f\x8b"):  # no text begins so
        return _read_text(file, suffix, wanted, every, form)
    try:
        with gzip.open(file) as unzipped:
            return _read_text(unzipped, suffix, wanted, every, form)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UnreadableError("is compressed by gzip and damaged, or cut off; get it anew.") from None


def _read_parquet(file, wanted, every):
    import pyarrow  # here, since it takes a while and most tables have no need of it

    from dplora_jax.data import arrow_table

    try:
        return arrow_table.read(file, wanted, every)
    except pyarrow.ArrowNotImplementedError:
        raise UnreadableError(
            "uses a part of Parquet that this program cannot read; write it with other options."
        ) from None
    except UnicodeDecodeError:
        raise UnreadableError("has text that is not UTF-8, as Parquet's must be; write it anew.") from None
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UnreadableError("cannot be read as Parquet: it is damaged, or cut off; write it anew.") from None


def _read_text(file, suffix, wanted, every, form):
    encoding = _encoding(file, form.encoding)
    # JSON's strings may hold what else ends a line; CSV's quoted cells keep theirs.
    newline = {".csv": "", ".tsv": "", ".txt": None}.get(suffix, "\n")
    stream = io.TextIOWrapper(file, encoding, newline=newline)
    try:
        if suffix == ".txt":
            return ["text"], {"text": [line.removesuffix("\n") for line in stream]}
        if suffix in (".csv", ".tsv"):
            plain = "\t" if suffix == ".tsv" else ","
            return csv_table.read(stream, wanted, every, tuple(dict.fromkeys((form.separator or plain, plain))))
        return json_table.read(stream, wanted, every)
    except UnicodeDecodeError:
        pass
    finally:
        stream.detach()  # `file` is the caller's to close
    file.seek(0)
    wanted = "another `encoding`" if form.encoding else "its `encoding` (cp1252 is common of Excel on Windows)"
    raise UnreadableError(
        f"is not {encoding} at line {_first_bad_line(file.read(), encoding)}; give {wanted}, or save it in UTF-8."
    )


def _first_bad_line(content, encoding):
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        content = content[: error.start]
    return content.decode(encoding, "ignore").count("\n") + 1


def _encoding(file, given):
    """The encoding of an open file: what its byte-order mark says, UTF-8 where it is UTF-8, and else what was `given`."""
    head = file.peek(4)[:4]
    for mark, name in MARKS.items():
        if head.startswith(mark):
            return name
    if given is None:
        if b"\0" in head:
            name = "utf-16-be" if head[0] == 0 else "utf-16-le"
            raise UnreadableError(
                f"is not UTF-8: it looks like UTF-16 without a byte-order mark; give encoding={name}."
            )
        return "utf-8"
    letters, zeros = _utf8(file)
    if codecs.lookup(given).name in ("utf-16", "utf-32"):
        if letters is None or zeros:
            raise UnreadableError(f"has no byte-order mark; give encoding={given}-le or encoding={given}-be.")
        return "utf-8"
    # It would be a wonder if all letters of another encoding were UTF-8 too. Where there are none, ASCII may be Japanese.
    return "utf-8" if letters and _keeps_ascii(given) else given


def _keeps_ascii(encoding):
    plain = bytes(range(128))
    return plain.decode(encoding, "replace") == plain.decode("ascii")


def _utf8(file):
    """(whether an open file has letters beyond ASCII, None where it is not UTF-8; whether it has zeros)."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    letters = zeros = False
    try:
        while chunk := file.read(1 << 20):
            decoder.decode(chunk)
            letters |= not chunk.isascii()
            zeros |= b"\0" in chunk
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        letters = None
    file.seek(0)
    return letters, zeros
