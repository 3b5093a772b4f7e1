"""What is accounted: each client's mechanism, as the configuration and public sizes decide it. No JAX."""

import dataclasses

import numpy as np

from dplora_jax.errors import InputError
from dplora_jax.federation import participation, trust
from dplora_jax.privacy import accounting, clippers, size_classes

LEVELS = 4  # of steps, of many clients that are in different numbers of rounds


def mechanisms(config, sizes):
    """Each client's mechanism: calibrated to the budget, or with the noise that is given."""
    return trust.mode(config).plan(config, sizes, lambda sizes: _by_client(config, sizes))


def _by_client(config, sizes):
    """The mechanism that each client's own noise makes, calibrated to the steps that it is in."""
    steps, mechanisms = planned_steps(participation.total_steps(config), sizes), [None] * len(sizes)
    for count in sorted(set(steps.tolist())):  # clients that are in as many rounds are calibrated together
        members = [client for client, client_steps in enumerate(steps) if client_steps == count]
        for client, mechanism in zip(
            members, _planned(config, [sizes[k] for k in members], max(count, 1)), strict=True
        ):
            mechanisms[client] = mechanism
    return mechanisms


def kept(stored, sizes):
    """The mechanisms that config.json (`stored`, a dict) has of a run that was charged already; InputError for other sizes."""
    began = [row["records"] for row in stored["federation"]["clients"]]
    if began != list(sizes):
        raise InputError(
            f"the clients have {sizes} records, and this workdir began with {began}, for which its budget was planned: "
            "restore them, or start a new `workdir`."
        )
    return written(stored)


def written(stored):
    """Each client's mechanism as config.json (a dict) has it: what an earlier version did not write is at its default."""
    names = [field.name for field in dataclasses.fields(accounting.Mechanism)]
    # The rows tell the clients' own records. The mechanism's are more where there are null ones; in mode `client`, the clients.
    default_records = (
        (lambda row: stored["clients"]) if trust.BY_NAME[stored["trust"]].bare_clients else (lambda row: row["records"])
    )
    return [
        accounting.Mechanism(
            **{name: row[name] for name in names if name in row}
            | {"records": row.get("sampled_from", default_records(row))}
        )
        for row in stored["federation"]["clients"]
    ]


def planned_steps(steps, sizes):
    """The steps that each client's noise is calibrated to, at least its own `steps` (int [K]): its own, or, where clients differ
    in more ways than are calibrated one by one, the next of a few (LEVELS) counts."""
    if len(set(zip(steps.tolist(), sizes, strict=True))) <= size_classes.MOST or len(set(steps.tolist())) <= LEVELS:
        return steps
    levels = np.ceil(np.linspace(steps.min(), steps.max(), LEVELS + 1)[1:]).astype(int)
    return levels[np.searchsorted(levels, steps)]


def _planned(config, sizes, steps):
    """The mechanisms of clients of `sizes` records that take `steps` local steps each."""
    options = {
        "adaptive": clippers.kind(config).moves,
        "count_noise": config.privacy.count_noise_multiplier,
        "bands": config.privacy.bands or 1,
    }
    if config.privacy.epsilon is not None:
        return accounting.calibrate(
            sizes, config.schedule.expected_batch_size, steps, config.privacy.epsilon, config.privacy.delta, **options
        )
    sigma = config.privacy.noise_multiplier or 0.0
    return accounting.with_noise(
        sizes, config.schedule.expected_batch_size, steps, sigma, config.privacy.delta, **options
    )
