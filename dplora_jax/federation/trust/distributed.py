"""Trust mode `distributed`: the server sees only the total of all clients' noisy sums, whose noise together carries the
guarantee (secure aggregation, simulated)."""

import dataclasses
import math

from dplora_jax.federation.trust.mode import (
    HOSTS,
    OWN_MACHINES,
    Mode,
    accounting,
    per_example_clipping,
    protected,
    public,
)

SIMULATED = (
    "Secure aggregation is SIMULATED here by a sum inside the program: a deployment needs a real protocol, for one "
    "client's upload "
    "alone carries too little noise."
)
MASKED = (
    "Each upload is a vector of integers under masks that every two parties agree on, and that cancel in the sum of "
    "all: neither the "
    "server nor anyone else can take them off one upload."
)


def _statements(config, apart):
    """The mode in words: `colluding` of at least `survivors` of `clients` tell what they know."""
    clients, survivors, colluding = config.schedule.clients, config.privacy.survivors, config.privacy.colluding
    h = _honest(config)
    return (
        "Who sees what: the server, the clients and the public see each round's TOTAL of the clients' noisy sums, and no "
        f"client's own upload. {MASKED if apart else SIMULATED}",
        protected(config),
        f"What is assumed: of {clients} clients at least {survivors} send their sum, or the round is void. At most {colluding} "
        "collude with the server and tell their own noise (one who is merely curious knows its own). The others, at least "
        f"h = {survivors} - {colluding} = {h}, each add Gaussian noise of variance sigma^2 C^2 / {h}, as they should. Whether a "
        "client sends depends on no record.",
        public(config),
        f"Secret by assumption: the honest clients' 256-bit keys. {OWN_MACHINES if apart else HOSTS}",
    )


def _checks(config):
    survivors, colluding, clients = config.privacy.survivors, config.privacy.colluding, config.schedule.clients
    yield (
        config.schedule.local_steps == 1,
        f"local_steps={config.schedule.local_steps} cannot be used with trust=distributed: only the total of all clients has "
        "enough noise to be looked at, so a round is one step. Use local_steps=1 and more `rounds`.",
    )
    yield (
        config.optimizer.client_optimizer == "sgd",
        f"client_optimizer={config.optimizer.client_optimizer} cannot be used with trust=distributed: a client's own gradient "
        "has too little noise, so the server holds all optimizer state. Use sgd and `server_momentum`.",
    )
    yield 1 <= survivors <= clients, f"survivors={survivors} must lie between 1 and clients={clients}."
    yield (
        colluding >= 1,
        f"colluding={colluding} must be 1 or more: every client knows its own noise and may be the curious one.",
    )
    yield (
        survivors - colluding >= 1,
        f"trust=distributed with {survivors} surviving clients of which {colluding} collude leaves no honest noise: raise "
        "`clients` or `survivors`, or lower `colluding`.",
    )


def _honest(config):
    """h: the clients that surely send, less those assumed to collude; their noise alone is counted on."""
    return config.privacy.survivors - config.privacy.colluding


def _largest_noise(config, sizes, by_client):
    """All clients' records hide in one and the same noise, that of the client which needs most."""
    mechanisms = by_client(sizes)
    largest = max(m.noise_multiplier for m in mechanisms)
    return [dataclasses.replace(m, noise_multiplier=largest) for m in mechanisms]


def _noise_shares(config, sizes, mechanisms):
    share = 1 / math.sqrt(_honest(config))
    return [dataclasses.replace(m, noise_multiplier=m.noise_multiplier * share) for m in mechanisms]


def _batch_weights(config, sizes, mechanisms):
    batches = MODE.expected(config, sizes, mechanisms)
    return [batch / sum(batches) for batch in batches]


def _secure_sum(config, mechanisms, sizes, robust):
    from dplora_jax.federation.secure_sum import SecureSum

    return SecureSum(sum(MODE.expected(config, sizes, mechanisms)), config.privacy.survivors)


MODE = Mode(
    "distributed",
    statements=_statements,
    method=lambda config, apart: [
        per_example_clipping(config),
        f"sum of noisy sums ({'masked' if apart else 'secure aggregation, simulated'}) over the sum of expected batches",
    ],
    accounting=lambda config, mechanisms, steps: accounting(config),
    plan=_largest_noise,
    shares=_noise_shares,
    sums=lambda shares: [shares],
    weights=_batch_weights,
    rule=_secure_sum,
    joining=lambda config: 1 - config.schedule.dropout,
    fields=("survivors", "colluding"),
    defaults=lambda config: {"survivors": config.schedule.clients, "colluding": 1, "dropout": 0.0},
    checks=_checks,
    protects=lambda config: f"every client's {config.privacy.unit}s (secure aggregation simulated)",
    notice=(
        "Secure aggregation is simulated.",
        "The guarantee is for those who see totals alone; a deployment needs a real protocol.",
    ),
    senders=lambda config, sent: {"survivors": sent, "void": sent < config.privacy.survivors},  # both are public
    public_uploads=False,
    masked=True,
)
