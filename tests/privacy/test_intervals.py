"""The intervals of noisy scores cover what they should, in seeded runs: the same on every machine, so there are no false alarms.

Each of 200 runs draws units from known shares, and noise. An interval is of noise and sampling together, so it must cover the
share that units are drawn from in about 95 % of runs (187 to 197 are seen; 180 or fewer would have probability 0.002 at 95 %),
and the exact score of these very units in at least 95 %.
"""

import numpy as np
import pytest

from dplora_jax.privacy import intervals, unit_scores

RUNS = 200


def shares(prior, accuracy):
    """[C, C]: labels by `prior`, each right with probability `accuracy` and else any other."""
    rows, classes = np.array(prior)[:, None], len(prior)
    return rows * np.where(np.eye(classes), accuracy, (1 - accuracy) / (classes - 1))


def runs(kind, draw, units, noise):
    """(scores under noise, exact scores) of each run."""
    bits = unit_scores.grid_bits(noise)
    for seed in range(RUNS):
        said = draw(np.random.default_rng(seed), units)
        exact = unit_scores.total(kind, said, np.arange(units), bits)
        seen = unit_scores.noisy(exact, noise, bits, bytes([seed]) * 32)
        yield kind.metrics(seen / 2**bits, units, noise), kind.metrics(exact / 2**bits, units, 0.0)


def coverage(kind, draw, units, noise, truth):
    """{metric: (runs in which its interval has the true value, the exact one; mean width)}"""
    counts = {name: [0, 0, 0.0] for name in truth}
    for noisy, exact in runs(kind, draw, units, noise):
        for name, (_, low, high) in noisy.items():
            counts[name][0] += low <= truth[name] <= high
            counts[name][1] += low <= exact[name][0] <= high
            counts[name][2] += (high - low) / RUNS
    return counts


@pytest.mark.parametrize(
    ("prior", "accuracy", "units", "noise"),
    [
        ((0.5, 0.5), 0.9, 60, 4.0), ((0.5, 0.5), 0.9, 500, 15.0), ((0.6, 0.3, 0.1), 0.75, 200, 8.0),
        ((0.6, 0.3, 0.1), 0.75, 2000, 20.0), ((0.2,) * 5, 0.6, 200, 20.0), ((0.2,) * 5, 0.6, 2000, 20.0),
    ],
)  # fmt: skip
def test_accuracy_and_macro_f1_lie_in_their_intervals(prior, accuracy, units, noise):
    table = shares(prior, accuracy)
    hits = np.diag(table)
    truth = {"accuracy": hits.sum(), "macro_f1": np.mean(2 * hits / (table.sum(0) + table.sum(1)))}
    draw = lambda rng, count: rng.choice(table.size, count, p=table.ravel())  # noqa: E731
    for name, (true, exact, width) in coverage(unit_scores.Labels(len(prior)), draw, units, noise, truth).items():
        assert true >= 181, name
        assert exact >= 190, name
        assert width < 0.12 or units < 2000, "an interval of all there is would cover too"


@pytest.mark.parametrize(("units", "noise"), [(60, 4.0), (200, 8.0), (2000, 20.0), (500, 0.5)])
def test_perplexity_lies_in_its_interval(units, noise):
    kind, draw = unit_scores.Losses(10.8), lambda rng, count: rng.gamma(6, 0.5, count)
    truth = np.exp(np.minimum(draw(np.random.default_rng(RUNS), 10**6), 10.8).mean())
    true, exact, width = coverage(kind, draw, units, noise, {"perplexity": truth})["perplexity"]
    assert true >= 181
    assert exact >= 190
    assert width < 6 or units < 500


def test_intervals_without_noise_are_those_of_a_binomial():
    table = np.array([[30.0, 10.0], [20.0, 40.0]])
    value, low, high = intervals.accuracy(table, 100, 0.0)
    assert value == 0.7
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.7 * 0.3 / 100), rel=1e-3)


def test_a_label_that_nobody_has_and_nobody_says_counts_nothing():
    table = np.array([[50.0, 0, 0], [0, 50.0, 0], [0, 0, 0]])
    assert intervals.macro_f1(table, 100, 0.0)[0] == pytest.approx(2 / 3)


def test_the_public_number_of_units_takes_noise_off():
    """A matrix that is settled adds up, and its accuracy is nearer to the truth."""
    rng, truth = np.random.default_rng(0), np.array([[45.0, 5.0], [5.0, 45.0]])
    noisy = truth + 5 * rng.standard_normal((2000, 2, 2))
    settled = np.array([intervals.settled(table, 100) for table in noisy])
    assert np.allclose(settled.sum((1, 2)), 100)
    traces = [np.trace(tables, axis1=1, axis2=2).var() for tables in (settled, noisy)]
    assert traces[0] == pytest.approx(traces[1] / 2, rel=0.15)
