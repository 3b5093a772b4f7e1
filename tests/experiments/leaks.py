"""Finds exact private statistics in the files of a working directory, whatever form they take there.

A single statistic is found as text of six significant digits or more, and as the bytes of a float32 or float64 (as it is,
or rounded to float32) of either byte order, at any offset, in the file itself, in what is compressed or base64 in it, or in the
arrays of a checkpoint.
A series is found to the digits that are written, few as they may be: as consecutive numbers of a text, as a column (the same
field of each line or list item, the same number of each line or table row), in an array, or as the bytes of integers or floats.
It counts when it tells BITS or more (a column COLUMN_BITS) beyond a straight line: counters and budgets are one, and
few digits may be equal by chance.

False alarms: BUILD_NOTES.md has the rates, measured with statistics drawn anew.
"""

import base64
import binascii
import bz2
import collections
import gzip
import json
import lzma
import math
import re
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp

NUMBER = re.compile(rb"(?<![\w.])-?\d+(?:\.\d+)?(?:[eE][-+]?\d{1,2})?(?![\w.])")
# Where a figure's lines run: thousands of numbers of seven digits, none of which is a statistic but by chance.
OUTLINES = re.compile(rb' (d|points|transform|x|y|x1|y1|x2|y2|width|height|viewBox)="[^"]*"')
BASE64 = re.compile(rb"[A-Za-z0-9+/]{24,}={0,2}")
KEYS = re.compile(rb'["\'<](loss|losses|norm|norms|clip_fraction|sampled)["\'>]')
DIGITS = 6
BITS, COLUMN_BITS = 16, 8  # a text has fewer columns than runs of numbers
LEAST = 1e-6  # a loss below is rounding
FLOAT32 = 1e-7  # relative: how far sums in float32 lie from the same in float64


class Sought:
    """What is looked for, in the orders that make looking fast: `singles` floats, `series` of `reductions.Series`."""

    def __init__(self, singles, series):
        exact = {abs(float(x)) for x in singles if LEAST < abs(x) < math.inf}
        self.float32 = np.unique(np.array(sorted(exact), np.float32))
        self.singles = np.unique([*exact, *self.float32.astype(float)])
        self.series = sorted(series)
        width = max(map(len, (s.values for s in self.series)))
        self.table = np.full((len(self.series), width), np.nan)
        for row, one in zip(self.table, self.series, strict=True):
            row[: len(one.values)] = one.values
        kinds = [order + kind for order in "<>" for kind in ("i2", "i4", "i8", "f4", "f8")] + ["u1"]
        self.patterns = collections.defaultdict(list)  # by their first eight bytes
        for one in self.series:
            whole = all(x == int(x) for x in one.values)
            if telling(np.array(one.values), np.full(len(one.values), 0.0), one.grain) < BITS:
                continue
            for kind in kinds if whole else [k for k in kinds if "f" in k]:
                top = np.iinfo(kind).max if kind[-2] != "f" else np.inf
                written = np.array(one.values).astype(kind).tobytes() if max(one.values) <= top else b""
                if len(written) >= 8:
                    self.patterns[int.from_bytes(written[:8], "little")].append(written)
        self.starts = np.array(sorted(self.patterns), np.uint64)


def search(folder, sought):
    """What was found of `Sought` in the files under `folder`: a list of (file, how)."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        for how, data in forms(path.read_bytes()):
            if KEYS.search(data):
                found.append((path, f"{how}: a key"))
            random = how == "base64" or "state" in path.parts  # hashes, and Orbax's compressed arrays
            found += [(path, f"{how}: {what}") for what in (*in_bytes(data, sought, random), *in_text(data, sought))]
    for path, arrays in checkpoints(folder):
        tape = [np.append(np.abs(np.ravel(a, order).astype(float)), np.nan) for a in arrays for order in "CF"]
        values = np.concatenate(tape) if tape else np.zeros(0)
        if np.isin(values.astype(np.float32), sought.float32).any():
            found.append((path, "array: a float"))
        found += [(path, f"array: {what}") for what in runs_in(values, 1e-6 * values, sought)]
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


def in_bytes(data, sought, random):
    """How the bytes of `data`, at whatever offset, tell a statistic. Where they may be `random`, two floats must stand side by
    side."""
    padded = np.frombuffer(data + bytes(8), np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 8)
    eight = np.ascontiguousarray(windows[: max(len(data) - 7, 0)])
    four = np.ascontiguousarray(windows[: max(len(data) - 3, 0), :4])
    with np.errstate(invalid="ignore"):
        for order in "<>":
            told = np.isin(np.abs(four.view(f"{order}f4")).ravel(), sought.float32)
            if (told[4:] & told[:-4] if random else told).any():
                yield "the bytes of a float32"
            told = near(np.abs(eight.view(f"{order}f8")).ravel(), sought.singles, 1e-12)
            if (told[8:] & told[:-8] if random else told).any():
                yield "the bytes of a float64"
    for start in np.intersect1d(eight.view("<u8"), sought.starts).tolist():
        if any(pattern in data for pattern in sought.patterns[start]):
            yield "the bytes of a series"


def near(values, singles, tolerance):
    """Which `values` lie within the relative `tolerance` (a number, or one for each) of one of the sorted `singles`."""
    after = np.searchsorted(singles, values)
    sides = singles[np.maximum(after - 1, 0)], singles[np.minimum(after, len(singles) - 1)]
    return np.any([np.abs(values - side) <= tolerance * side for side in sides], 0)


def in_text(data, sought):
    """How `data` tells a statistic, read as text: numbers of DIGITS digits or more, or a series of any."""
    tokens, said = NUMBER.findall(data), NUMBER.findall(OUTLINES.sub(b"", data))
    for token in {t for t in said if len(re.sub(rb"[eE].*|\.|-", b"", t).lstrip(b"0")) >= DIGITS}:
        value = abs(float(token))
        if value and near(np.array([value]), sought.singles, half_a_digit(token) / value + FLOAT32).any():
            yield f"the number {token.decode()}"
    for runs, bits in ([tokens], BITS), (columns(data), COLUMN_BITS):
        tape = [token for run in runs for token in (*run, None)]
        values = np.array([math.nan if t is None else abs(float(t)) for t in tape])
        yield from runs_in(values, np.array([math.nan if t is None else half_a_digit(t) for t in tape]), sought, bits)


def half_a_digit(token):
    """Half of the last digit's worth of a decimal number's text."""
    mantissa, _, exponent = token.lower().partition(b"e")
    return 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(b".")[2]))


def columns(data):
    """Lists of the numbers (as text) that stand in the same place of each line, table row and item of a JSON list."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return []  # random bytes have newlines too
    lines = re.split(rb"\n|<tr", data)
    places = collections.defaultdict(list)
    for line in lines:
        for place, token in enumerate(NUMBER.findall(line)):
            places["line", place].append(token)
    documents = []
    for text in (data, *lines):
        try:
            documents.append(json.loads(text, parse_float=str.encode, parse_int=str.encode))
        except ValueError:
            continue
    for path, token in leaves(documents):
        for position in (i for i, key in enumerate(path) if isinstance(key, int)):
            places[*path[:position], None, *path[position + 1 :]].append(token)
    return [column for column in places.values() if len(column) > 2]


def leaves(document, path=()):
    """(path, number as text) of each number in a JSON document."""
    if isinstance(document, bytes):
        yield path, document
    elif isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield from leaves(value, (*path, key))


def runs_in(values, halves, sought, bits=BITS):
    """Which series stand in `values` as consecutive numbers, each within `halves`; NaN ends a run."""
    halves = halves * (1 + 1e-6) + FLOAT32 * values
    order = np.argsort(sought.table[:, 0], kind="stable")
    firsts = sought.table[order, 0]
    low, high = np.searchsorted(firsts, values - halves), np.searchsorted(firsts, values + halves, "right")
    many = np.where(np.isnan(values), 0, high - low)
    position = np.repeat(np.arange(len(values)), many)
    which = order[np.repeat(low - np.cumsum(many) + many, many) + np.arange(many.sum())]
    padded, allowed = (np.append(x, np.full(sought.table.shape[1], np.nan)) for x in (values, halves))
    for i in range(1, sought.table.shape[1]):
        wanted = sought.table[which, i]
        keep = np.isnan(wanted) | (np.abs(padded[position + i] - wanted) <= allowed[position + i])
        position, which = position[keep], which[keep]
    for start, index in zip(position.tolist(), which.tolist(), strict=True):
        series = sought.series[index]
        there = slice(start, start + len(series.values))
        if telling(values[there], halves[there], series.grain) >= bits:
            yield f"the series {series.values}"


def telling(values, halves, grain):
    """Bits by which a series is no straight line: what counters, budgets and other steady columns tell is none."""
    x = np.arange(len(values)) - (len(values) - 1) / 2
    centred = values - values.mean()
    rest = centred - x * (centred @ x) / (x @ x)
    unit = max(2 * halves.max(), grain, 1e-6 * np.abs(values).max())
    return (len(values) - 1) * math.log2(max(1.0, np.ptp(rest) / unit))


def checkpoints(folder):
    """(path, arrays) of each saved step under `folder`, restored as what it holds and not as what one expects."""
    for step in sorted(path.parent for path in folder.rglob("_METADATA")):
        yield step, [np.asarray(x) for x in jax.tree.leaves(ocp.StandardCheckpointer().restore(step))]
