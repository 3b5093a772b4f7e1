"""What a run whose unit is a record costs somebody who has several of them: the control for units.

A step that samples records at rate q takes Binomial(m, q) of a person's m records, each of which moves the sum by at most the
clip norm: a mixture of Gaussians (Charles et al. 2024, arXiv 2407.07737, section 4; Choquette-Choo et al. 2024, arXiv
2310.15526). This is tighter than the rule that m records have m epsilon.
"""

import functools

import numpy as np
import scipy.stats
from dp_accounting.pld import privacy_loss_distribution as pld

from dplora_jax.privacy import accounting, noise_search

GRID = 1e-2  # of the privacy losses


def epsilon(rate, noise_multiplier, steps, delta, records):
    """epsilon at `delta` of somebody with `records` records, after `steps` steps of plain Poisson sampling at `rate` (an upper
    bound; a fixed batch capacity is not reckoned with).

    >>> round(epsilon(0.1, 4.0, 20, 1e-5, 1), 2), round(epsilon(0.1, 4.0, 20, 1e-5, 4), 2)
    (0.43, 1.99)
    """
    loss = _step(rate, noise_multiplier, records, GRID).self_compose(steps)
    return float(loss.get_epsilon_for_delta(delta - accounting.ROUNDING * steps))


def least_noise(rate, steps, target, delta, records):
    """The least noise multiplier that keeps somebody with `records` records within (target, delta); InputError as of
    `accounting.calibrate`."""
    accounting.check_delta(delta, steps)
    return noise_search.least(lambda noise: epsilon(rate, noise, steps, delta, records), target, float(records), 5e-4)


@functools.lru_cache(maxsize=16)
def _step(rate, noise_multiplier, records, grid):
    joined = np.arange(records + 1)
    chances = scipy.stats.binom.pmf(joined, records, rate)
    likely = chances > 1e-300  # the accountant takes no chance of zero
    return pld.from_mixture_gaussian_mechanism(
        noise_multiplier, joined[likely], chances[likely], value_discretization_interval=grid
    )
