"""Every sum, mean, share and running total of a run's private statistics that a line of logging might write.

Letters: R rounds, K clients, S local steps; axes stand in this order.
"""

import itertools
from fractions import Fraction
from typing import NamedTuple

import numpy as np

COMMON = 24  # a share with a denominator up to this one may be anything's


class Series(NamedTuple):
    """Numbers in the order in which they would be written; `grain` is the distance at which such numbers lie."""

    values: tuple
    grain: float


def every(totals, counts, sizes):
    """(singles, series) of `totals` {name: [R, K, S]}, sums over the `counts` [R, K, S] of records that joined, of `sizes` [K].

    Singles are floats that few things but the statistic equal: no whole numbers, no shares with a small denominator.
    """
    singles, series = set(), set()
    for kept in (axes for n in range(4) for axes in itertools.combinations(range(3), n)):
        for exact, grain, array in _reduced(totals, counts, sizes, kept):
            for form in _running(array, kept):
                singles |= {x for x in np.ravel(form).tolist() if not exact or not _common(x)}
                series |= {Series(tuple(x), grain) for x in _orders(form) if len(set(x)) > 2}
    return singles, series


def _reduced(totals, counts, sizes, kept):
    """(whether a ratio of whole numbers, grain, array over the `kept` axes) for each way of taking the others together."""
    gone = tuple(axis for axis in range(3) if axis not in kept)
    number, many = counts.sum(gone), counts.size // counts.sum(gone).size
    yield True, 1.0, number
    yield True, 1 / many, number / many
    held = sizes[None, :, None].sum(tuple(axis for axis in gone if axis == 1), keepdims=True)
    for visits in 1, many if 1 not in gone else many // counts.shape[1]:
        share = counts.sum(gone, keepdims=True) / held / visits
        yield True, 1 / held.max() / visits, share.reshape(number.shape)
    for name, total in totals.items():
        exact = name == "clipped"
        yield exact, 1.0 if exact else 0.0, total.sum(gone)
        yield exact, 1 / many if exact else 0.0, total.sum(gone) / many
        yield exact, 1e-2 if exact else 0.0, total.sum(gone) / np.maximum(number, 1)
        yield exact, 1e-2 if exact else 0.0, (total / np.maximum(counts, 1)).mean(gone)


def _running(array, kept):
    """The array, and what it adds up to and averages as rounds, or steps, go by."""
    yield array
    for axis in (kept.index(a) for a in kept if a != 1):
        total = array.cumsum(axis)
        yield total
        yield total / np.arange(1, array.shape[axis] + 1).reshape([-1 if i == axis else 1 for i in range(array.ndim)])
    if kept in ((0, 2), (0, 1, 2)):
        by_time = np.moveaxis(array, 1, -1) if len(kept) == 3 else array[..., None]
        total = by_time.reshape(-1, by_time.shape[-1]).cumsum(0)
        yield total
        yield total / np.arange(1, len(total) + 1)[:, None]


def _orders(array):
    """Lists of its numbers: along each choice of axes, the others fixed, whichever index runs fastest."""
    for count in range(1, array.ndim + 1):
        for axes in itertools.permutations(range(array.ndim), count):
            last = np.moveaxis(array, axes, range(-count, 0))
            yield from last.reshape(-1, np.prod(last.shape[-count:])).tolist()


def _common(x):
    return abs(x - float(Fraction(x).limit_denominator(COMMON))) < 1e-9 * max(1, abs(x))
