"""The smallest noise multiplier whose cost is within a budget."""

import math

from dplora_jax.errors import InputError

NOISE_RANGE = (0.05, 1e4)


def least(cost, target, guess, tolerance):
    """The smallest noise with cost <= target, to a relative tolerance, by a secant in logarithms kept inside a bracket."""
    low, high = NOISE_RANGE[0], None
    noise, costs = guess, {}
    for _ in range(60):
        costs[noise] = value = cost(noise)
        if value <= target:
            high = noise
            if value >= target * (1 - tolerance) or high <= low * (1 + tolerance / 4):
                return noise
        else:
            low = noise
        if high is None and noise >= NOISE_RANGE[1]:
            break
        slope = _slope(costs)
        secant = noise * (target * (1 - tolerance / 2) / max(value, 1e-9)) ** (1 / slope)
        inside = low < secant < (high or math.inf)
        noise = secant if inside else math.sqrt(low * high) if high else low * 2
        noise = min(max(noise, NOISE_RANGE[0]), NOISE_RANGE[1])
    raise InputError(
        f"epsilon {target:g} is out of reach: no noise multiplier in {NOISE_RANGE} gives it; raise `epsilon` or `delta`."
    )


def _slope(costs):
    """d log cost / d log noise from the two last evaluations; -1.5 to begin with."""
    (x0, y0), (x1, y1) = (list(costs.items()) * 2)[-2:]
    if x0 == x1 or min(y0, y1) <= 0 or not math.isfinite(y0 + y1) or y0 == y1:
        return -1.5
    return min(-0.2, math.log(y1 / y0) / math.log(x1 / x0))
