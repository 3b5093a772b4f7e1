"""Who takes part in which round: a schedule that is public and fixed before the run.

Being public it amplifies nothing; a client pays for the rounds that it is in, and for no other.
"""

import numpy as np

from dplora_jax.errors import InputError

ADVICE = "write all, fixed:M or poisson:P"


def check(spec, clients):
    """Raise InputError unless `spec` is `all`, `fixed:M` with M in 1..`clients`, or `poisson:P` with P in (0, 1]."""
    kind, _, argument = spec.partition(":")
    try:
        value = {"all": lambda _: 1, "fixed": int, "poisson": float}[kind](argument)
    except (KeyError, ValueError):
        raise InputError(f"participation={spec} is malformed; {ADVICE}.") from None
    if (spec == "all") != (kind == "all"):
        raise InputError(f"participation={spec} is malformed; {ADVICE}.")
    if kind == "fixed" and not 1 <= value <= clients:
        raise InputError(f"participation={spec} must name between 1 and clients={clients} clients.")
    if kind == "poisson" and not 0 < value <= 1:
        raise InputError(f"participation={spec} must lie above 0, at most 1.")


def schedule(spec, clients, rounds, seed):
    """bool [rounds, K]: who takes part in rounds 1, 2, ..., drawn from the public `seed`.

    `all`; `fixed:M`, M clients a round, those who were in fewest rounds so far, ties broken at random, so that counts differ by
    at most one; `poisson:P`, each client in each round with probability P, independently.
    """
    check(spec, clients)
    kind, _, argument = spec.partition(":")
    if kind == "all":
        return np.ones((rounds, clients), bool)
    rng = np.random.default_rng([seed, 7])  # apart from the draws of the split and the partition
    if kind == "poisson":
        return rng.random((rounds, clients)) < float(argument)
    chosen, times = np.zeros((rounds, clients), bool), np.zeros(clients, int)
    for row in chosen:
        order = np.lexsort((rng.random(clients), times))
        row[order[: int(argument)]] = True
        times += row
    return chosen
