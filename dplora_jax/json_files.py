"""JSON that anyone may have written: read within bounds, held once against a schema, and trusted from there on.

A check is a function of a JSON value: it returns the value, or raises Unfit with words for what it should have been.

>>> record({"rounds": list_of(whole(1, 100))})({"rounds": [1, 20]})
{'rounds': [1, 20]}
"""

import json
import math
import os
import re
import stat

from dplora_jax import errors

MOST_BYTES = 256 << 20  # of a file
MOST_TEXT = 16 << 20  # of one line of it
MOST_PARTS = 1 << 21  # objects and lists of one JSON text: each takes a hundred times its brackets
MOST_ITEMS = 1 << 23  # commas of it: a number of two bytes takes twenty, and a name of three a hundred
DEEPEST = 64


class Unfit(ValueError):
    """What is read is not what it should be; the message says what it is not, without a full stop."""


def read(path):
    """The bytes of a plain file; FileNotFoundError where there is none, another OSError where the storage fails, Unfit for all
    else that cannot be read whole."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a pipe would have us wait
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Unfit("it is not a plain file")
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or errors.storage(error):
            raise
        raise Unfit(f"it cannot be read ({error.strerror})") from None
    if len(data) > MOST_BYTES:
        raise Unfit(f"it has more than {MOST_BYTES >> 20} MiB")
    return data


def parse(data, check, most=MOST_TEXT):
    """The JSON value of bytes, as `check` has it; Unfit."""
    if len(data) > most:
        raise Unfit("it is too large")
    if data.count(b"[") + data.count(b"{") > MOST_PARTS:
        raise Unfit(f"it holds more than {MOST_PARTS} lists and objects")
    if data.count(b",") > MOST_ITEMS:
        raise Unfit(f"it holds more than {MOST_ITEMS} commas")
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError, MemoryError):  # no UTF-8, no JSON, a number of 5,000 digits, absurdly deep
        raise Unfit("it is not JSON") from None
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [item for part in level for item in _items(part)]
        if not level:
            return check(value)
    raise Unfit(f"it is nested more than {DEEPEST} deep")


def _items(value):
    """The lists and objects directly in a list or an object."""
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in held if isinstance(item, dict | list)]


def load(path, check):
    """The JSON value of a file, as `check` has it."""
    return parse(read(path), check, MOST_BYTES)


def anything(value):
    """The check that all values pass."""
    return value


def scalar(value):
    """No list and no object: they could be of any size and depth."""
    if isinstance(value, dict | list):
        raise Unfit("is not a single value")
    return value


def whole(low, high):
    """A whole number."""
    words = f"is not a whole number from {low} to {high}"
    return _where(lambda value: type(value) is int and low <= value <= high, words)


def real(low=-math.inf, high=math.inf, above=False):
    """A number from `low` (or above it) to `high` that a float can hold, as it is; "inf" is infinity."""
    words = f"is not a number {'above' if above else 'from'} {low:g} to {high:g}"

    def check(value):
        value = math.inf if value == "inf" else value
        if type(value) not in (int, float) or not low <= value <= high or (above and value == low):
            raise Unfit(words)
        if type(value) is int and value.bit_length() > 1000:
            raise Unfit(words)
        return value

    return check


def flag(value):
    """true or false."""
    return _where(lambda value: type(value) is bool, "is neither true nor false")(value)


def text(most=200):
    """Text of at most so many characters."""
    return _where(lambda value: type(value) is str and len(value) <= most, f"is not text of at most {most} characters")


def hexadecimal(most=128, least=0):
    """Hexadecimal digits, as of a hash."""
    digits = re.compile(f"[0-9a-f]{{{least},{most}}}")
    return _where(lambda value: type(value) is str and digits.fullmatch(value), f"is not {least} to {most} hex digits")


def one_of(*values):
    """One of these."""
    return _where(lambda value: type(value) is str and value in values, f"is not one of {', '.join(values)}")


def optional(check):
    """null, or what `check` lets pass."""
    return lambda value: None if value is None else check(value)


def list_of(check, most=MOST_PARTS, least=0):
    """A list."""

    def checked(value):
        if type(value) is not list or not least <= len(value) <= most:
            raise Unfit(f"is not a list of {least}{f' to {most}' if most > least else ''}")
        try:
            return [check(item) for item in value]
        except Unfit as error:
            raise Unfit(f"has one that {error}") from None

    return checked


def mapping_of(check, most=100, name=64):
    """An object of any names."""

    def checked(value):
        if (
            type(value) is not dict
            or len(value) > most
            or any(len(key) > name or not key.isidentifier() for key in value)
        ):
            raise Unfit(f"is not an object of at most {most} names")
        return record({}, dict.fromkeys(value, check))(value)

    return checked


def record(required, known=None, rest=scalar):
    """An object with the fields `required` {name: check}, perhaps those `known`, and others, a later version's, that `rest` lets
    pass."""
    fields = (known or {}) | required

    def checked(value):
        if type(value) is not dict:
            raise Unfit("is not an object")
        for name in required:
            if name not in value:
                raise Unfit(f"has no {name}")
        out = {}
        for name, item in value.items():
            try:
                out[name] = fields.get(name, rest)(item)
            except Unfit as error:
                raise Unfit(f"{name if name in fields else 'a field that is not known'} {error}") from None
        return out

    return checked


def _where(holds, words):
    def check(value):
        if not holds(value):
            raise Unfit(words)
        return value

    return check
