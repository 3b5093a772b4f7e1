"""Who takes part in which round: a schedule that is public and fixed before the run, who fails to send, and what that makes of
each client's steps; no JAX.

Being public, the schedule amplifies nothing; a client pays for the rounds that it is in, and for no other.
"""

import functools

import numpy as np

from dplora_jax.errors import InputError
from dplora_jax.federation import trust
from dplora_jax.privacy import secrets

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


def draw_schedule(spec, clients, rounds, seed):
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


def partial(config):
    """Whether, in modes `local` and `none`, some client may be missing from some round."""
    return trust.mode(config).public_uploads and (scheduled(config) or bool(config.schedule.dropout))


def scheduled(config):
    """Whether clients are in some rounds only, by a public schedule: then each pays for its own."""
    return config.schedule.participation != "all"


@functools.lru_cache(maxsize=4)
def _schedule(spec, clients, rounds, seed):
    return draw_schedule(spec, clients, rounds, seed)


def schedule(config):
    """bool [rounds, K]: who is in rounds 1, 2, ..."""
    return _schedule(
        config.schedule.participation, config.schedule.clients, config.schedule.rounds, config.schedule.split_seed
    )


def steps(config, rounds=None):
    """int [rounds, K]: the steps of the private mechanism of each client in each of `rounds` [a, b), or in all.

    One that fails to send has taken its steps, and may have been seen taking them: it pays too.
    """
    first, end = rounds or (1, config.schedule.rounds + 1)
    return schedule(config)[first - 1 : end - 1].astype(int) * trust.mode(config).steps_per_round(config)


def total_steps(config):
    """int [K]: the steps of the private mechanism of each client in all rounds."""
    return schedule(config).sum(0) * trust.mode(config).steps_per_round(config)


def joins(config, party_secrets, rounds, attempt):
    """float32 [rounds, K] of 0 or 1: who is in each of `rounds` (a range) and does not fail to send, by `party_secrets`."""
    sent = secrets.joins(party_secrets[: config.schedule.clients], rounds, attempt, 1 - (config.schedule.dropout or 0))
    return sent * np.asarray(schedule(config)[rounds.start - 1 : rounds.stop - 1], np.float32)
