"""Flagfiles: a flag a line, `--name=value`. What a line says is what is meant, or one sentence names the file and the line.

A line that begins with # or // is a comment, and so is what follows a space, one of these and a space behind a value. A value
in quotes is what stands between them. `--flagfile=NAME` in a flagfile is read in its place: beside that file, else in the
current folder, else among the shipped ones.
"""

import copy
import pathlib
import re
from typing import NamedTuple

from absl import flags

from dplora_jax.errors import InputError

SHIPPED = pathlib.Path(__file__).parents[1] / "flagfiles"  # the project's own
COMMENTS = ("#", "//")
# As word processors and web pages write them: hyphens, dashes and the minus sign; quotes, primes and accents.
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
QUOTES = "\u201c\u201d\u201e\u201f\u2018\u2019\u201a\u201b\u00ab\u00bb\u2039\u203a\u2032\u2033\u00b4`"
PLAINER = {  # what absl and Python say, and what is meant
    r"invalid literal for int\(\).*": "it must be a whole number",
    r"could not convert string to float.*": "it must be a number",
    r"\('Non-boolean argument.*": "it must be true or false",
}


class Word(NamedTuple):
    """An argument of the command line; `place` is the flagfile and line that it stands in, "" where it was typed."""

    text: str
    place: str = ""


def parse(argv, values, program):
    """Read `argv` and its flagfiles into absl's `values` -> (what is not a flag, the name of the last flagfile that `argv` itself
    names, or None). Raises InputError."""
    words, name = expand(argv, values)
    try:
        rest = values([program, *(word.text for word in words)])[1:]
    except (flags.Error, ValueError) as error:  # absl's own for --noflag=value is a ValueError
        culprit = next(filter(None, (_wrong(values, word) for word in words if word.place)), None)
        raise InputError(culprit or _said(error)) from None
    return rest, name


def refuse_rest(rest):
    """InputError where a command line holds what is not a flag."""
    if rest:
        hint = (
            "it begins with another dash than -; write --"
            if rest[0].lstrip("-").startswith(tuple(DASHES))
            else "every option is a --flag"
        )
        raise InputError(f"unexpected argument {rest[0]!r}: {hint}.")


def _said(error):
    """absl's error as one plain sentence."""
    text = " ".join(str(error).split())
    for pattern, plain in PLAINER.items():
        text = re.sub(pattern, plain, text)
    return f"{text.rstrip('.? ')}{'?' if text.rstrip('.').endswith('?') else '.'}"


def _wrong(values, word):
    """What absl says of one flagfile's line alone, with its place; None where it takes it."""
    try:
        copy.deepcopy(values)(["", word.text])
    except (flags.Error, ValueError) as error:
        return f"{word.place}: {_said(error)}"
    return None


def expand(argv, values):
    """`argv` with its flagfiles read in their places -> (list of Word, the last one's name or None)."""
    words, name, left = [], None, list(argv)
    while left:
        word = left.pop(0)
        if word == "--":
            return [*words, Word(word), *map(Word, left)], name
        flag, equals, value = _split(word)
        if flag is None:
            words.append(Word(word))
            continue
        if flag == "flagfile":
            value = value if equals else left.pop(0) if left else ""
            path = _find(value, (pathlib.Path(),), ())
            words += _read(path, values, (path,))
            name = path.stem
            continue
        words.append(Word(word))
        if not equals and _takes_value(values, flag) and left:
            if left[0].startswith("--"):  # absl would take that flag for the value
                raise InputError(f"{word} has no value: it is followed by {left[0]}.")
            words.append(Word(left.pop(0)))
    return words, name


def _split(word):
    """(flag's name, "=" or "", value) of -name=value or --name=value; a name of None for other words."""
    match = re.match(r"--?([A-Za-z]\w*)(=?)", word)
    if not match or (not match[2] and match.end() < len(word)):
        return None, "", ""
    return match[1], match[2], word[match.end() :]


def _takes_value(values, flag):
    return flag in values and not values[flag].boolean


def _find(name, folders, open_files):
    """The flagfile `name`: in one of `folders`, else a shipped one, but none of those that are being read."""
    asked = pathlib.Path(name).expanduser()
    places = [folder / asked for folder in (*folders, SHIPPED)]
    existing = [path for path in places if name and path.is_file()]
    path = next((path for path in existing if not any(path.samefile(other) for other in open_files)), None)
    if path is None and existing:
        raise InputError(
            f"flagfile {existing[0]} is read while it is being read: it names itself, or a file that names it."
        )
    if path is None:
        shipped = ", ".join(sorted(p.name for p in SHIPPED.glob("*.flags")))
        raise InputError(f"flagfile {name!r} is neither here nor among the shipped ones ({shipped}).")
    return path


def _read(path, values, open_files):
    """The Words of a flagfile; `open_files` are those that are being read, itself the last."""
    words, seen = [], {}
    for number, line in enumerate(_lines(path), 1):
        place, line = f"{path}, line {number}", line.strip()
        if not line or line.startswith(COMMENTS):
            continue
        try:
            flag, equals, value = _flag(line)
            if flag == "flagfile":
                inner = _find(value, (path.parent, pathlib.Path()), open_files)
                words += _read(inner, values, (*open_files, inner))
                continue
            if not equals and _takes_value(values, flag):
                raise InputError(f"--{flag} has no value: write --{flag}=VALUE.")
            known = flag in values and not isinstance(values[flag], flags.MultiFlag)
            if known and seen.setdefault(flag, (value, number))[0] != value:
                raise InputError(f"--{flag} stands in line {seen[flag][1]} too, with another value: leave one.")
        except InputError as error:
            raise InputError(str(error) if str(error).startswith(f"{path}, ") else f"{place}: {error}") from None
        words.append(Word(f"--{flag}{equals}{value}", place))
    return words


def _lines(path):
    try:
        content = path.read_bytes()
        if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
            raise InputError(f"flagfile {path} is not UTF-8 text (UTF-16, by its first bytes): save it as UTF-8.")
        return re.split(r"\r\n|\r|\n", content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"flagfile {path}, line {line} is not UTF-8 text: save it as UTF-8.") from None


def _flag(line):
    """(name, "=" or "", value) of a flagfile's line; InputError where what it says is not clear."""
    if line.lstrip("-").startswith(tuple(DASHES)):
        raise InputError(f"{line!r} begins with another dash than -: write --name=value.")
    if not line.startswith("-"):
        raise InputError(f"{line!r} is not a flag: write --name=value, or # before a comment.")
    match = re.match(r"--?([A-Za-z][\w-]*)(.*)", line, re.DOTALL)
    if not match:
        raise InputError(f"{line!r} names no flag: write --name=value.")
    name, rest = match[1], match[2]
    if rest.startswith("="):
        return name, "=", _value(rest[1:])
    rest = _without_comment(rest)
    if rest:
        raise InputError(f"{line!r}: write --{name}={rest.strip().lstrip('=').strip()}, without spaces around =.")
    return name, "", ""


def _value(text):
    """The value that `text`, all that follows the = of a line, stands for."""
    if text[:1].isspace():
        raise InputError("a space follows the =: write --name=value, and a value that begins with a space in quotes.")
    if text[:1] in ('"', "'"):
        inner, closing, after = text[1:].partition(text[0])
        if not closing:
            raise InputError(f"the value {text} has no closing quote: add it, or leave out the first.")
        if _without_comment(after):
            raise InputError(f"the value {text} goes on behind its closing quote: put quotes around all of it.")
        return inner
    if text[:1] and text[0] in QUOTES:
        raise InputError(f"the value {text} begins with a typographic quote: write \" or ', or none.")
    value = _without_comment(text)
    if re.search(r"\s--?[A-Za-z]", value):
        raise InputError(
            f"the value {value!r} holds a second flag: write a flag a line, or put quotes around the value."
        )
    if value.endswith("\\"):
        raise InputError(f"the value {value} ends with \\, which continues no line here: write a flag a line.")
    return value


def _without_comment(text):
    """`text` up to a comment, which is set off by spaces on both sides; InputError where it may be one or not."""
    match = re.search(r"(?:^|\s)(#|//)(?=\s|$)", text)
    text = text[: match.start()].rstrip() if match else text.rstrip()
    if unclear := re.search(r"\s(#|//)\S*", text):
        raise InputError(
            f"{unclear[0].strip()!r} may be a comment or a part of the value: put a space behind {unclear[1]}, or quotes around "
            "the value."
        )
    return text
