"""What the accountant claims of batches cut to a capacity, against the exact delta of neighbours that an adversary may choose.

One record's gradient is +1 or, in the neighbour, null; the others' are all `others`. Of null records beside it (`size_classes`)
none has a gradient, and all may take rows.
"""

import collections
import dataclasses

import numpy as np
import pytest
from scipy import stats

from dplora_jax.privacy import accounting
from dplora_jax.privacy.accounting import Mechanism


def sums(size, mechanism, others):
    """The law of a step's sum before its noise, with the record there and null: two dicts {sum: probability}. `size` of the
    mechanism's records are real."""
    m, there, null = mechanism, collections.Counter(), collections.Counter()

    def add(law, rows, start, weight):
        """`rows` of the other records stay: how many of them are real is hypergeometric."""
        for real in range(min(rows, size - 1) + 1):
            law[start + real * others] += weight * stats.hypergeom.pmf(real, m.records - 1, size - 1, rows)

    for joined in range(m.records):  # of the others
        chance = stats.binom.pmf(joined, m.records - 1, m.sampling_rate)
        kept = min(1.0, m.capacity / (joined + 1))  # the record's chance of a row, once it has joined
        for law, own in (there, 1), (null, 0):
            add(law, min(joined, m.capacity), 0, chance * (1 - m.sampling_rate))
            add(law, min(joined, m.capacity - 1), own, chance * m.sampling_rate * kept)
            add(law, min(joined, m.capacity), 0, chance * m.sampling_rate * (1 - kept))
    return there, null


def delta(one, other, sigma, epsilon):
    """delta at `epsilon` of two laws under N(0, sigma^2), by a fine trapezoid rule."""
    points = sorted(one | other)
    x = np.arange(points[0] - 9 * sigma, points[-1] + 9 * sigma, sigma / 400)
    p, q = (sum(law[at] * stats.norm.pdf(x, at, sigma) for at in points) for law in (one, other))
    return np.trapezoid(np.maximum(p - np.exp(epsilon) * q, 0), x)


@pytest.mark.parametrize(
    ("size", "mechanism"),
    [
        (30, Mechanism(30, 0.1, 1, 1.0)),
        (12, Mechanism(12, 0.2, 1, 1.5)),
        (20, Mechanism(20, 0.3, 6, 1.5)),
        (9, Mechanism(14, 0.2, 1, 1.5)),  # five null records
        (1, Mechanism(6, 0.6, 2, 0.7)),
    ],
)
def test_no_neighbours_are_told_apart_better_than_is_charged(size, mechanism):
    """Where a batch has one row and all records are real, plain Poisson sampling would charge less than a twentieth of it."""
    loss, plain = (
        accounting.step_loss(m) for m in (mechanism, dataclasses.replace(mechanism, capacity=mechanism.records))
    )
    ratio = 0.0
    for others in (-1, 0, 1):
        laws = sums(size, mechanism, others)
        assert [sum(law.values()) for law in laws] == pytest.approx([1, 1])
        for epsilon in (0.0, 0.3, 1.0, 2.0):
            for pair in laws, laws[::-1]:
                found = delta(*pair, mechanism.noise_multiplier, epsilon)
                assert found <= loss.get_delta_for_epsilon(epsilon) * (1 + 1e-4) + 1e-9, (others, epsilon)
                ratio = max(ratio, found / plain.get_delta_for_epsilon(epsilon))
    assert (ratio > 20) == (mechanism.capacity == 1 and size == mechanism.records)
