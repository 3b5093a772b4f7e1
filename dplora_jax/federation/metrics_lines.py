"""The lines of metrics.jsonl: what a dispatch of rounds cost and did, all of it public. `job` is a `dispatch.Job`."""

import numpy as np

from dplora_jax.federation import dispatch, participation, processes, trust
from dplora_jax.privacy import accounting

# What a line has beside metrics.
FIELDS = (
    "round", "epsilon", "epsilon_max", "seconds", "examples_per_second", "release", "bytes_up_per_client",
    "bytes_down_per_client", "survivors", "void", "finished", "dropped", "clip_norm", "private_test_epsilon",
)  # fmt: skip


def base_line(clients):
    """The line of round 0, before anything private is trained on, and before it is evaluated."""
    return {
        "round": 0,
        "epsilon": [0.0] * clients,
        "epsilon_max": 0.0,
        "seconds": 0.0,
        "bytes_up_per_client": 0,
        "bytes_down_per_client": 0,
    }


def dispatch_lines(job, rounds, attempt, seconds, shown):
    """The metrics lines of rounds [a, b): everything in them is public; `shown` is `execute`'s."""
    if not processes.primary():
        return [{"round": rounds[1] - 1, "epsilon_max": 0.0}]  # nobody sees it
    config, sent = job.config, job.description["communication"]
    length = rounds[1] - rounds[0]
    epsilons = _epsilons(job, rounds)
    share = (
        np.mean(participation.schedule(config)[rounds[0] - 1 : rounds[1] - 1]) if participation.partial(config) else 1
    )
    rate = float(
        length * share * trust.expected_examples(config, job.prepared.sizes, job.prepared.mechanisms) / seconds
    )
    lines, senders = [], trust.senders(config, dispatch.paid_secrets(job), range(*rounds), attempt)
    for index in range(length):
        lines.append(
            {
                "round": rounds[0] + index,
                "epsilon": epsilons[index],
                "epsilon_max": max(epsilons[index]),
                "seconds": seconds / length,
                "examples_per_second": rate,
                "release": job.description["release"] or "NO PRIVACY",
                "bytes_up_per_client": sent["bytes_up_per_client_per_round"],
                "bytes_down_per_client": sent["bytes_down_per_client_per_round"],
                **senders[index],
                **({} if shown[1] is None else _finished(job, rounds[0] + index, attempt, shown[1][index])),
            }
        )
    return lines


def charged(job):
    """What the ledger says that each client has spent, every attempt that was begun included."""
    if not trust.mode(job.config).private or job.ledger is None or not job.ledger.begun:
        return {}
    spent = job.ledger.epsilons(job.config.privacy.delta)
    return {"epsilon": spent, "epsilon_max": max(spent)}


def _epsilons(job, rounds):
    """What each client has spent after each of rounds [a, b), lost attempts included: a list of K floats a round."""
    config = job.config
    dispatch_steps = participation.steps(config, rounds)
    before = job.ledger.charged_steps(config.schedule.clients) - dispatch_steps.sum(
        0
    )  # this dispatch is charged already
    counts = before + np.cumsum(dispatch_steps, 0)
    spent = []
    for mechanism, client_counts in zip(job.prepared.mechanisms, counts.T.tolist(), strict=True):
        (end,) = accounting.epsilon_curve(mechanism, (client_counts[-1],), config.privacy.delta)
        coarse = accounting.epsilon_curve(mechanism, tuple(client_counts[:-1]), config.privacy.delta, 1e-2)
        spent.append([*(min(value, end) for value in coarse), end])  # no round costs more than a later one
    return [list(column) for column in zip(*spent, strict=True)]


def _finished(job, number, attempt, valid):
    """Where not every client's upload counted in round `number`, as all can see in modes `local` and `none`: how many did, and
    whose was dropped for numbers that are not finite. `valid` [K'] is the program's flag for each."""
    config = job.config
    valid = valid[: config.schedule.clients]
    if valid.all():
        return {}
    sent = np.ones(config.schedule.clients, bool)
    if participation.partial(config):
        sent = participation.joins(config, dispatch.paid_secrets(job), range(number, number + 1), attempt)[0] > 0
    return {"finished": int(valid.sum()), "dropped": np.flatnonzero(sent & ~valid).tolist()}
