"""What a client's epsilon still pays for, by what the ledger has charged. `job` is a `dispatch.Job`."""

import numpy as np

from dplora_jax.errors import InputError
from dplora_jax.federation import participation, trust
from dplora_jax.privacy import ledger as ledgers


def stay_within(job, rounds):
    """Refuse rounds that would take a client past its epsilon, by what the ledger would then say."""
    config = job.config
    if config.privacy.epsilon is None:
        return
    mechanisms = [ledgers.describe(mechanism) for mechanism in job.prepared.mechanisms]
    planned = {"rounds": rounds, "clients": mechanisms, "local_steps": trust.mode(config).steps_per_round(config)}
    planned["steps"] = job.steps(rounds).sum(0).tolist()
    spent = max(job.ledger.epsilons(config.privacy.delta, [planned]))
    if spent > config.privacy.epsilon:
        raise InputError(
            f"rounds {rounds[0]} to {rounds[1] - 1} would take a client to epsilon {spent:.4g}, past {config.privacy.epsilon:g}; "
            "start a new `workdir`."
        )


def affordable(job, done):
    """The last round that no client has to pay more for than was planned: lost attempts have been paid for too."""
    config, mechanisms = job.config, job.prepared.mechanisms
    if not participation.scheduled(config) and not job.prepared.rounds.local.noise.over_rounds:
        return done + config.schedule.rounds - job.ledger.charged_rounds()
    planned = job.steps().sum(0)
    # A block that ends here is paid for to the end of its turns, and what was calibrated for is whole turns.
    nothing = {"rounds": (done + 1, done + 1), "local_steps": 0, "clients": [*map(ledgers.describe, mechanisms)]}
    whole = [m.bands * m.charged(steps) for steps, m in zip(planned.tolist(), mechanisms, strict=True)]
    left = np.array(whole) - job.ledger.charged_steps(len(planned), [nothing])
    needed = np.cumsum(job.steps((done + 1, config.schedule.rounds + 1)), 0)
    return done + int(np.logical_and.accumulate((needed <= left).all(1)).sum())
