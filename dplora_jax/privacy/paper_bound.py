"""The bound of the DP-LoRA paper (Liu et al., arXiv 2312.17493), to be printed beside the accountant's; it promises nothing.

The paper takes over theorem 1 of the moments accountant (Abadi et al. 2016): there are constants c1 and c2 such that T steps at
sampling rate q are (epsilon, delta)-private, for any epsilon < c1 q^2 T, if

    sigma >= c2 q sqrt(T log(1 / delta)) / epsilon.

Neither source gives the constants. Here c2 = 1 and log is natural; solved for epsilon, that is q sqrt(T log(1 / delta)) / sigma.
With c2 = 1 it is not an upper bound: at q = 1 it lies below the exact epsilon of the Gaussian, whose leading term is
sqrt(2 T log(1 / delta)) / sigma. Nor is its condition checked, c1 being unknown; epsilon < q^2 T is what c1 = 1 would ask.
The paper also clips a batch's mean gradient rather than each example's, so its sigma refers to another sensitivity.
"""

import math


def epsilon(sampling_rate, noise_multiplier, steps, delta):
    """q sqrt(T log(1 / delta)) / sigma; infinite without noise.

    >>> round(epsilon(8 / 775, 2.0, 50, 1e-5), 4)
    0.1238
    """
    if noise_multiplier == 0:
        return math.inf
    return sampling_rate * math.sqrt(steps * math.log(1 / delta)) / noise_multiplier


def reach(sampling_rate, steps):
    """q^2 T: below it lies every epsilon that the theorem may speak of, were c1 = 1."""
    return sampling_rate**2 * steps


def sentence(mechanisms, steps, delta):
    """What a report says of it: the largest value over the clients, and that it is not a guarantee."""
    largest = max(epsilon(m.sampling_rate, m.noise_multiplier, steps, delta) for m in mechanisms)
    return (
        f"The DP-LoRA paper's asymptotic bound, q sqrt(T log(1/delta)) / sigma with its unspecified constant set to 1, would say "
        f"epsilon {largest:.3f}; it is not a guarantee."
    )
