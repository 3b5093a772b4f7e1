"""Finds exact private statistics in the files of a working directory, whatever form they take there.

A single statistic is found as text of six significant digits or more, and as the bytes of a float32 or float64 of either byte
order, at any offset, in the file itself, in what is compressed or base64 in it, or in the arrays of a checkpoint. A series
(counts, shares: numbers that others may equal by chance) is found as consecutive numbers of a text or array, to the digits
that are there.
"""

import base64
import binascii
import bz2
import gzip
import lzma
import math
import re
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp

NUMBER = re.compile(rb"(?<![\w.])-?\d+(?:\.\d+)?(?:[eE][-+]?\d{1,2})?(?![\w.])")
BASE64 = re.compile(rb"[A-Za-z0-9+/]{24,}={0,2}")
KEYS = re.compile(rb'["\'<](loss|losses|norm|norms|clip_fraction|sampled)["\'>]')
DIGITS = 6


def search(folder, singles, series):
    """What was found: a list of (file, how); `singles` are floats, `series` lists of three numbers or more."""
    singles = sorted({abs(float(np.float32(x))) for x in singles if x and math.isfinite(x)})
    patterns = {np.array(x).astype(kind).tobytes() for x in singles for kind in ("<f4", ">f4", "<f8", ">f8")}
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        for how, data in forms(path.read_bytes()):
            if KEYS.search(data):
                found.append((path, f"{how}: a key"))
            if any(pattern in data for pattern in patterns):
                found.append((path, f"{how}: the bytes of a float"))
            found += [(path, f"{how}: {what}") for what in in_text(data, singles, series)]
    for path, arrays in checkpoints(folder):
        flat = [np.asarray(x).reshape(-1) for x in arrays]
        numbers = np.abs(np.concatenate([x.astype(np.float32) for x in flat])) if flat else np.zeros(0)
        if np.isin(numbers, np.array(singles, np.float32)).any():
            found.append((path, "array: a float"))
        if any(runs_through([float(v) for v in x], s, [1e-6 * abs(v) for v in s]) for x in flat for s in series):
            found.append((path, "array: a series"))
    return found


def forms(data):
    """(name, bytes) of a file's content, unpacked where it can be."""
    yield "file", data
    for name, unpack in (
        ("gzip", gzip.decompress),
        ("zlib", zlib.decompress),
        ("bz2", bz2.decompress),
        ("xz", lzma.decompress),
    ):
        try:
            yield name, unpack(data)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError):
            continue
    for match in BASE64.findall(data):
        try:
            yield "base64", base64.b64decode(match)
        except binascii.Error:
            continue


def in_text(data, singles, series):
    """How `data` tells a statistic, read as text: numbers of DIGITS digits or more, or a series of any."""
    tokens = NUMBER.findall(data)
    values = [abs(float(token)) for token in tokens]
    halves = [half_a_digit(token) for token in tokens]
    for value, half, token in zip(values, halves, tokens, strict=True):
        if len(re.sub(rb"^0+|[eE].*|\.|-", b"", token).lstrip(b"0")) >= DIGITS:
            near = singles[max(np.searchsorted(singles, value) - 1, 0) :][:2]
            if any(abs(value - single) <= half + 1e-7 * single for single in near):
                yield f"the number {token.decode()}"
    for numbers in series:
        if runs_through(values, numbers, [], halves):
            yield f"the series {numbers}"


def half_a_digit(token):
    """Half of the last digit's worth of a decimal number's text."""
    mantissa, _, exponent = token.lower().partition(b"e")
    return 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(b".")[2]))


def runs_through(values, series, tolerances, halves=None):
    """Whether `series` stands in `values` as consecutive numbers, within each one's tolerance."""
    count = len(series)
    for start in range(len(values) - count + 1):
        allowed = tolerances or halves[start : start + count]
        if all(abs(values[start + i] - series[i]) <= allowed[i] * (1 + 1e-6) for i in range(count)):
            return True
    return False


def checkpoints(folder):
    """(path, arrays) of each saved step under `folder`, restored as what it holds and not as what one expects."""
    for step in sorted(path.parent for path in folder.rglob("_METADATA")):
        yield step, jax.tree.leaves(ocp.StandardCheckpointer().restore(step))
