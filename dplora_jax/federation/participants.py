"""Which clients a run's flags put into which round, and what that makes of each one's steps; no JAX."""

import functools

import numpy as np

from dplora_jax.federation import participation, trust_modes
from dplora_jax.privacy import secrets


def partial(config):
    """Whether, in modes `local` and `none`, some client may be missing from some round."""
    return trust_modes.mode(config).public_uploads and (
        config.schedule.participation != "all" or bool(config.schedule.dropout)
    )


def scheduled(config):
    """Whether clients are in some rounds only, by a public schedule: then each pays for its own."""
    return config.schedule.participation != "all"


@functools.lru_cache(maxsize=4)
def _schedule(spec, clients, rounds, seed):
    return participation.schedule(spec, clients, rounds, seed)


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
    return schedule(config)[first - 1 : end - 1].astype(int) * config.steps_per_round


def total_steps(config):
    """int [K]: the steps of the private mechanism of each client in all rounds."""
    return schedule(config).sum(0) * config.steps_per_round


def joins(config, held, rounds, attempt):
    """float32 [rounds, K] of 0 or 1: who is in each of `rounds` (a range) and does not fail to send, by the secrets `held`."""
    sent = secrets.joins(held[: config.schedule.clients], rounds, attempt, 1 - (config.schedule.dropout or 0))
    return sent * np.asarray(schedule(config)[rounds.start - 1 : rounds.stop - 1], np.float32)
