"""What noise that is correlated over rounds would leave in the released average, over what independent noise leaves.

    python -m experiments.benchmark --measure=correlated_noise

Nothing is trained. The average of the last round is linear in the rounds' noise, so its noise is exact: |w| sigma for
independent noise, and |w C^-1| sigma_b for noise C^-1 z of b bands, C's columns of norm 1 (Choquette-Choo et al. 2023). Both
multipliers are `accounting.calibrate`'s. With b bands a step samples from one of b parts of the records in turn; where a part
is smaller than a batch, the part is the batch.
"""

import functools
from typing import NamedTuple

import numpy as np
from scipy import optimize

from dplora_jax.privacy import accounting
from dplora_jax.privacy.banded_rounds import coefficients
from experiments.text.tables import Table

EPSILONS = (1, 2, 4, 8)
DELTA = 1e-5
LEARNED = (0.5, 0.9, 0.99)
CURVATURES = (0.0, *np.geomspace(1e-4, 0.3, 1000))


class Setting(NamedTuple):
    """A shipped flagfile's rounds, as noise sees them; `records` of each client."""

    records: int
    batch: float
    rounds: int
    momentum: float
    lr_decay: float
    ema: float
    bands: tuple


SETTINGS = {
    "finance": Setting(640, 128, 18, 0.5, 0.2, 0.8, (2, 4, 5, 8, 16, 18)),
    "phrasebank": Setting(775, 155, 30, 0.9, 1.0, 0.8, (2, 3, 5, 8, 16, 30)),
    "medical": Setting(200, 32, 8, 0.9, 1.0, 0.5, (2, 4, 6, 8)),
}


def responses(setting, curvature=0.0):
    """(averages, adapters), each [T, T]: row t after round t+1, column s by a unit of noise in round s+1's mean upload. A
    quadratic loss of `curvature` (times the client's rate) pulls each round's upload back by that share of the adapter."""
    noise = np.eye(setting.rounds)
    velocity = adapter = average = np.zeros(setting.rounds)
    averages, adapters = [], []
    for t in range(setting.rounds):
        velocity = setting.momentum * velocity + noise[t] - curvature * adapter
        adapter = adapter + (1 + (setting.lr_decay - 1) * t / setting.rounds) * velocity
        average = average + (1 - setting.ema) / (1 - setting.ema ** (t + 1)) * (adapter - average)
        averages.append(average)
        adapters.append(adapter)
    return np.array(averages), np.array(adapters)


def curvature_that_learns(setting, share):
    """The least of CURVATURES with which the last average has come `share` of the way to the loss's minimum."""
    return next(h for h in CURVATURES if h * responses(setting, h)[0][-1].sum() >= share)


def least_last(last, bands):
    """The infimum of |last C^-1| over all C of so many bands whose columns have norm at most 1: with r = last C^-1, last_i =
    <r, c_i> is at most the norm of r's entries i to i + bands - 1, and columns along these attain it. Linear in r squared."""
    reach = np.tri(len(last)).T - np.tri(len(last), k=-bands).T
    return optimize.linprog(np.ones(len(last)), A_ub=-reach, b_ub=-(last**2)).fun ** 0.5


def factor(workload, bands):
    """The C of so many bands and columns of norm 1 with the least |workload C^-1|, from the square root of the prefix sum."""
    rounds = workload.shape[1]
    band = (np.tri(rounds) - np.tri(rounds, k=-bands)) > 0
    root = np.cumprod([1, *(1 - 0.5 / np.arange(1, rounds))])
    start = root[np.maximum(np.subtract.outer(np.arange(rounds), np.arange(rounds)), 0)][band]
    workload = workload / np.linalg.norm(workload)

    def normalised(entries):
        free = np.zeros((rounds, rounds))
        free[band] = entries
        norms = np.linalg.norm(free, axis=0)
        return free / norms, norms

    def error(entries):
        c, norms = normalised(entries)
        inverse = np.linalg.inv(c)
        out = workload @ inverse
        slope = np.where(band, -2 * out.T @ out @ inverse.T, 0)
        return (out**2).sum(), ((slope - c * (c * slope).sum(0)) / norms)[band]

    options = {"maxiter": 3000, "maxfun": 6000, "ftol": 1e-12}
    return normalised(optimize.minimize(error, start, jac=True, method="L-BFGS-B", options=options).x)[0]


def built(setting, bands):
    """The C that `noise=banded_rounds` has."""
    return sum(np.eye(setting.rounds, k=-k) * float(c) for k, c in enumerate(coefficients(bands, setting.momentum)))


@functools.cache
def noise_std(setting, epsilon, bands=1):
    """The noise's std on a round's mean gradient, in clip norms."""
    batch = min(setting.batch, setting.records / bands)
    made = accounting.calibrate([setting.records], batch, setting.rounds, epsilon, DELTA, bands=bands)[0]
    return made.noise_multiplier / batch


def ratios(setting, bands, curvature=0.0, c=None):
    """Over independent noise: the std of the last average and the root mean square of the adapters on the way, with the matrix
    `c` (default: what is best for the averages of all rounds), and the least std of the last average -> three of [epsilons]."""
    averages, adapters = responses(setting, curvature)
    inverse = np.linalg.inv(factor(averages, bands) if c is None else c)
    gain = lambda rows: np.linalg.norm(rows @ inverse) / np.linalg.norm(rows)  # noqa: E731
    cost = np.array([noise_std(setting, e, bands) / noise_std(setting, e) for e in EPSILONS])
    least = least_last(averages[-1], bands) / np.linalg.norm(averages[-1])
    return gain(averages[-1:]) * cost, gain(adapters) * cost, least * cost


def tables():
    """The lines of each setting's tables: by bands, with the matrix that is built, and the least over bands by how much of the
    signal is learned."""
    head = [f"epsilon {epsilon}" for epsilon in EPSILONS]
    for name, setting in SETTINGS.items():
        full = setting._replace(batch=setting.records)
        rows = []
        for bands in setting.bands:
            last, way, least = (r[:, None] for r in ratios(setting, bands))
            rows.append([str(bands), *(f"{a:.2f}, {b:.2f}, {c:.2f}" for a, b, c in np.hstack([last, way, least]))])
        rows.append(
            ["all records, independent", *(f"{noise_std(full, e) / noise_std(setting, e):.2f}" for e in EPSILONS)]
        )
        yield f"\n{name}: last average, adapters on the way, least last average\n"
        yield Table(["bands", *head], rows).markdown()
        rows = []
        for bands in setting.bands:
            if bands * setting.batch <= setting.records:  # others are refused
                ours, best = ratios(setting, bands, c=built(setting, bands))[0], ratios(setting, bands)[0]
                rows.append([str(bands), *(f"{a:.3f}, {b:.3f}" for a, b in zip(ours, best, strict=True))])
        yield f"\n{name}: last average as it is built, and with the best matrix\n"
        yield Table(["bands", *head], rows).markdown()
        rows = []
        for share in (0, *LEARNED):
            curvature = curvature_that_learns(setting, share)
            last = np.array([ratios(setting, bands, curvature)[0] for bands in setting.bands])
            best = zip(last.min(0), last.argmin(0), strict=True)
            rows.append([f"{share:g}", *(f"{ratio:.2f} ({setting.bands[i]})" for ratio, i in best)])
        yield f"\n{name}: last average, the least over bands (bands)\n"
        yield Table(["learned", *head], rows).markdown()
