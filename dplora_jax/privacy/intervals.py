"""Scores of noisy counts, with the 95 % intervals that noise and sampling leave: by the delta method; no JAX.

The noise is public, so its share of an interval is exact; the share of sampling is that of `units` independent units.
`tests/privacy/test_intervals.py` has the coverage over seeded runs. Letters: C classes (rows are labels, columns what was said).
"""

import math

import numpy as np

Z = 1.959964  # standard deviations on either side of a 95 % interval


def settled(matrix_CxC, units):
    """The noisy confusion matrix, its surplus over the public number of `units` taken off each cell alike: the least change that
    makes it add up, and less noise in what is made of it."""
    return matrix_CxC + (units - matrix_CxC.sum()) / matrix_CxC.size


def accuracy(matrix_CxC, units, std):
    """(value, low, high) of the share of right labels, of a `settled` matrix whose cells had noise of `std`."""
    share = np.trace(matrix_CxC) / units
    gradient_CxC = np.eye(len(matrix_CxC)) / units
    return around(share, _deviation(gradient_CxC, matrix_CxC, units, std))


def macro_f1(matrix_CxC, units, std):
    """(value, low, high) of the mean of the labels' F1 = 2 hits / (row + column), likewise; 0 for a label whose row and column
    have less than a unit."""
    hits_C, sums_C = np.diag(matrix_CxC), matrix_CxC.sum(0) + matrix_CxC.sum(1)
    sums_C = np.maximum(sums_C, 1.0)
    value = np.mean(2 * hits_C / sums_C)
    falls_C = 2 * hits_C / sums_C**2
    gradient_CxC = (np.diag(2 / sums_C) - falls_C[:, None] - falls_C[None, :]) / len(hits_C)
    return around(value, _deviation(gradient_CxC, matrix_CxC, units, std))


def _deviation(gradient_CxC, matrix_CxC, units, std):
    """The standard deviation of a function of the matrix with this gradient: its noise, less what settling takes off, and that of
    drawing `units` units from the shares that the matrix has."""
    noise = std * np.linalg.norm(gradient_CxC - gradient_CxC.mean())
    shares_CxC = np.clip(matrix_CxC / units, 0, None)
    shares_CxC = shares_CxC / max(shares_CxC.sum(), 1e-9)
    mean = (shares_CxC * gradient_CxC).sum()
    sampling = units * (shares_CxC * (gradient_CxC - mean) ** 2).sum()
    return math.sqrt(noise**2 + sampling)


def spread(mean, second_moment):
    """The standard deviation of numbers in [-1, 1] of this mean and this second moment, both noisy: at least 0, and at most what
    such numbers can have."""
    return math.sqrt(min(max(second_moment - mean**2, 0.0), max(1 - mean**2, 0.0)))


def around(value, deviation, least=0.0, most=1.0):
    """(value, low, high), each within `least` and `most`."""
    ends = value, value - Z * deviation, value + Z * deviation
    return tuple(float(min(max(end, least), most)) for end in ends)
