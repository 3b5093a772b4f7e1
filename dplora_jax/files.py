"""What every JSON file that the program writes has in common: any parser reads it, for it holds no NaN and no Infinity."""

import json
import math


def read_if_there(path):
    """The bytes of the file at `path`, or None where there is none. Never `path.exists()` first: to some versions of Python a
    file in a folder that was lost, or may not be read, is as none, and a ledger or a secret would be begun anew."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def plain(value):
    """`value` with "inf", "-inf" or "nan", which Python's `float` reads back, for each number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def number(value):
    """The float of a JSON value that `plain` may have written; None for what is no number."""
    if isinstance(value, str) and value in ("inf", "-inf", "nan"):
        return float(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def to_json(value, **options):
    """`value` as strict JSON text; `options` are json.dumps's.

    >>> to_json({"epsilon": float("inf"), "loss": [float("nan"), 0.5]})
    '{"epsilon": "inf", "loss": ["nan", 0.5]}'
    """
    return json.dumps(plain(value), allow_nan=False, **options)
