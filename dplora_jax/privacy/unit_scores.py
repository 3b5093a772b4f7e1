"""What a record that is kept back adds to a score: numbers of L2 norm at most 1, summed as integers under integer noise; no JAX.

A unit is a record, or all rows of one person; it counts once however many rows it has. Each kind of score is an object with

- `width`, how many numbers are released;
- `of_units(outcomes, unit, counts)`: float64 [U, width], what U units add, each of norm at most 1, of what their rows say
  (`outcomes` [R]), the unit of each row (`unit` int [R], below U), and how many rows each has (`counts` int [U]);
- `metrics(total, units, std)`: {name: (value, low, high)} of the noisy sum of `units` units, whose numbers have noise of standard
  deviation `std`, with the 95 % interval that noise and sampling leave (`intervals`).

Letters: R rows, U units, C classes.
"""

import dataclasses
import math

import numpy as np

from dplora_jax.privacy import host_noise, integers, intervals

MOST_BITS = 20
CHUNK = 1024  # units at a time
MOMENT = 0.5  # the second moment's weight beside a loss: its noise is then twice the mean's, and the mean's 3 % more


@dataclasses.dataclass(frozen=True)
class Labels:
    """The confusion matrix of `classes` labels; an outcome is label * C + what was said, int [R]."""

    classes: int

    @property
    def width(self):
        """A number for each pair of a label and what was said."""
        return self.classes**2

    def of_units(self, outcomes, unit, counts):
        """The share of a unit's rows that each pair has: non-negative numbers that add up to 1."""
        shares = np.zeros((len(counts), self.width))
        np.add.at(shares, (unit, outcomes), 1 / counts[unit])
        return shares

    def metrics(self, total, units, std):
        """Accuracy and macro-F1."""
        matrix_CxC = intervals.settled(total.reshape(self.classes, self.classes), units)
        return {
            "accuracy": intervals.accuracy(matrix_CxC, units, std),
            "macro_f1": intervals.macro_f1(matrix_CxC, units, std),
        }


@dataclasses.dataclass(frozen=True)
class Losses:
    """The mean loss of units, each cut to [0, `most`] nats; an outcome is a row's mean loss of a token, float [R].

    A loss is released centred, as x = 2 loss / most - 1 in [-1, 1], which halves the noise, with a part of x^2 - 1/2, which tells
    how wide the interval must be.
    """

    most: float
    width = 2

    def of_units(self, outcomes, unit, counts):
        """(x, MOMENT (x^2 - 1/2)) of the mean over a unit's rows, scaled to norm at most 1; a loss that is not a number is the
        largest."""
        losses = np.clip(np.nan_to_num(np.asarray(outcomes, np.float64), nan=self.most, posinf=self.most), 0, self.most)
        means = np.zeros(len(counts))
        np.add.at(means, unit, losses / counts[unit])
        x = 2 * means / self.most - 1
        return np.stack([x, MOMENT * (x**2 - 0.5)], 1) / self._longest

    @property
    def _longest(self):
        return math.sqrt(1 + (MOMENT / 2) ** 2)

    def metrics(self, total, units, std):
        """exp of the mean over units."""
        mean, moment = self._longest * total / units / (1, MOMENT)
        spread = intervals.spread(mean, moment + 0.5)
        noise = self._longest * std / units
        ends = intervals.around(mean, math.hypot(noise, spread / math.sqrt(units)), -1, 1)
        return {"perplexity": tuple(math.exp(self.most * (x + 1) / 2) for x in ends)}


def grid_bits(noise):
    """The finest grid 2^-bits on which a draw of the noise multiplier `noise` never leaves int32."""
    return min(MOST_BITS, 30 - math.ceil(math.log2(max(1.0, integers.REACH * noise))))


def total(kind, outcomes, units, bits):
    """The sum over units of what they add, in whole numbers of 2^-bits -> int64 [width].

    `outcomes` are the rows' [R], `units` the number of the unit that each is of (int [R]). Each unit's numbers are cut towards
    zero to integers, and the norm of these is then taken exactly: a unit whose norm is above 2^bits adds nothing. So a unit moves
    the sum by at most 2^bits, whatever floating point does.
    """
    _, unit, rows = np.unique(units, return_inverse=True, return_counts=True)
    summed = np.zeros(kind.width, np.int64)
    for start in range(0, len(rows), CHUNK):
        counts = rows[start : start + CHUNK]
        here = (unit >= start) & (unit < start + len(counts))
        added = kind.of_units(outcomes[here], unit[here] - start, counts)
        summed += within(added, bits).sum(0)
    return summed


def within(added, bits):
    """`added` (float [U, width]) in whole numbers of 2^-bits, int64, without the units whose L2 norm is above 1."""
    inside = np.where(np.abs(added) <= 1, added, 2.0)  # what is not a number is not inside
    numbers = np.trunc(inside * 2.0**bits).astype(np.int64)
    return np.where((numbers**2).sum(1, keepdims=True) <= 1 << 2 * bits, numbers, 0)


def noisy(summed, noise, bits, key):
    """`summed` and integer noise of multiplier `noise`, drawn from `key` (32 bytes; `host_noise`) -> int64 [width]."""
    if not noise:
        return summed
    return summed + host_noise.rounded_normal(key, len(summed), noise * 2.0**bits)
