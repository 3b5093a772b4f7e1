"""What a trust mode makes of a configuration: one record each, and the only place where its name is looked up; no JAX until a
rule is made."""

import dataclasses
import math
from collections.abc import Callable

from dplora_jax.privacy import accounting, paper_bound, trust
from dplora_jax.privacy.accounting import Mechanism
from dplora_jax.privacy.secrets import joins
from experiments import aggregation_words


@dataclasses.dataclass(frozen=True)
class Mode:
    """`private` says whether it has a guarantee, `public_uploads` whether everyone sees each client's upload, `bare_clients`
    whether clients train without clipping and noise of their own. `parties(config)` have a secret, and a round is `steps(config)`
    steps of the private mechanism.

    Of a `config`, the clients' public `sizes` and their `mechanisms`:
    - `plan(config, sizes, by_client)`: the Mechanisms that are accounted, where `by_client(sizes)` makes each client's own;
    - `shares`: what each client does itself, as Mechanisms: its sampling of its own records, and the noise that it adds;
    - `expected`: how many of its own records each client expects in a local step's batch;
    - `weights`: each client's share of the mean, if all take part;
    - `rule(config, mechanisms, sizes, robust)`: the server's part of a round (`aggregation.Mean` and the like);
    - `joining(config)`: the probability with which a client takes part in a round; None where all always do;
    - `senders(config, sent)`: what a round's metrics tell of how many clients sent.
    In words: `statements(config)`, two lines or more on the `method`, and `accounting(config, mechanisms, steps)`.
    """

    name: str
    statements: Callable
    method: Callable
    accounting: Callable
    plan: Callable = lambda config, sizes, by_client: by_client(sizes)
    shares: Callable = lambda config, sizes, mechanisms: mechanisms
    expected: Callable = lambda config, sizes, mechanisms: [
        m.sampling_rate * n for m, n in zip(mechanisms, sizes, strict=True)
    ]
    weights: Callable = lambda config, sizes, mechanisms: [n / sum(sizes) for n in sizes]
    rule: Callable = lambda config, mechanisms, sizes, robust: _mean(robust)
    joining: Callable = lambda config: None
    senders: Callable = lambda config, sent: {}
    parties: Callable = lambda config: config.schedule.clients
    steps: Callable = lambda config: config.schedule.local_steps
    private: bool = True
    public_uploads: bool = True
    bare_clients: bool = False


def mode(config):
    """The Mode of a run's `config`."""
    return BY_NAME[config.privacy.trust]


def examples(config, sizes, mechanisms):
    """The expected count of records in a round's batches: public, unlike the count that was drawn."""
    trust_mode = mode(config)
    rate = trust_mode.joining(config)
    return (
        (1 if rate is None else rate)
        * config.schedule.local_steps
        * sum(trust_mode.expected(config, sizes, mechanisms))
    )


def senders(config, secrets, rounds, attempt):
    """What metrics tell of who took part, a dict a round."""
    trust_mode = mode(config)
    rate = trust_mode.joining(config)
    if rate is None:
        return [{}] * len(rounds)
    return [trust_mode.senders(config, int(sent)) for sent in joins(secrets, rounds, attempt, rate).sum(1)]


def _mean(robust):
    from dplora_jax.federation import aggregation
    from dplora_jax.federation.robust import RobustMean

    return aggregation.MEAN if robust is None else RobustMean(robust)


RECORDS = (
    "Privacy loss distributions (dp_accounting) of Poisson sampling with a fixed capacity and the Gaussian mechanism; "
    "neighbours differ in one record, replaced by a null record."
)


def _clipped(config):
    return f"DP-LoRA (arXiv 2312.17493), per-example clipping {_clipping(config)}"


LOCAL = Mode(
    "local",
    statements=lambda config: trust.LOCAL,
    method=lambda config: [_clipped(config), *aggregation_words.lines(config)],
    accounting=lambda config, mechanisms, steps: (
        f"{RECORDS} {paper_bound.sentence(mechanisms, steps, config.privacy.delta)}"
    ),
)
NONE = dataclasses.replace(
    LOCAL,
    name="none",
    statements=lambda config: trust.NONE,
    method=lambda config: ["Federated LoRA, no noise", *aggregation_words.lines(config)],
    accounting=lambda config, mechanisms, steps: RECORDS,
    private=False,
)


def _honest(config):
    """h: the clients that surely send, less those assumed to collude; their noise alone is counted on."""
    return config.privacy.survivors - config.privacy.colluding


def _of_one_noise(config, sizes, by_client):
    """All clients' records hide in one and the same noise, that of the client which needs most."""
    made = by_client(sizes)
    most = max(m.noise_multiplier for m in made)
    return [dataclasses.replace(m, noise_multiplier=most) for m in made]


def _noise_shares(config, sizes, mechanisms):
    share = 1 / math.sqrt(_honest(config))
    return [dataclasses.replace(m, noise_multiplier=m.noise_multiplier * share) for m in mechanisms]


def _batch_weights(config, sizes, mechanisms):
    batches = DISTRIBUTED.expected(config, sizes, mechanisms)
    return [batch / sum(batches) for batch in batches]


def _secure_sum(config, mechanisms, sizes, robust):
    from dplora_jax.federation.secure_sum import SecureSum

    return SecureSum(sum(DISTRIBUTED.expected(config, sizes, mechanisms)), config.privacy.survivors)


DISTRIBUTED = Mode(
    "distributed",
    statements=lambda config: trust.distributed(
        config.schedule.clients, config.privacy.survivors, config.privacy.colluding
    ),
    method=lambda config: [
        _clipped(config),
        "sum of noisy sums (secure aggregation, simulated) over the sum of expected batches",
    ],
    accounting=lambda config, mechanisms, steps: RECORDS,
    plan=_of_one_noise,
    shares=_noise_shares,
    weights=_batch_weights,
    rule=_secure_sum,
    joining=lambda config: 1 - config.schedule.dropout,
    senders=lambda config, sent: {"survivors": sent, "void": sent < config.privacy.survivors},  # both are public
    public_uploads=False,
)


def _clients_as_records(config, sizes, by_client):
    """One mechanism, once for each client: a sample of the clients, one whole update being the record."""
    noise = config.privacy.noise_multiplier
    if noise is None:
        noise = accounting.least_noise(
            config.schedule.clients,
            config.privacy.client_rate,
            config.schedule.rounds,
            config.privacy.epsilon,
            config.privacy.delta,
        )
    return [
        Mechanism(config.schedule.clients, config.privacy.client_rate, config.schedule.clients, noise)
    ] * config.schedule.clients


def _trusted_server(config, mechanisms, sizes, robust):
    from dplora_jax.federation.trusted_server import TrustedServer

    std = mechanisms[0].noise_multiplier * config.privacy.clip_norm
    return TrustedServer(config.privacy.client_rate * config.schedule.clients, config.privacy.clip_norm, std)


CLIENT = Mode(
    "client",
    statements=lambda config: trust.client(config.schedule.clients, config.privacy.client_rate),
    method=lambda config: [
        f"DP-FedAvg (McMahan et al. 2018) of LoRA: each client's whole update clipped at L2 norm {config.privacy.clip_norm:g}",
        "uniform weights, noise at the server, over the expected number of clients",
    ],
    accounting=lambda config, mechanisms, steps: (
        "Privacy loss distributions (dp_accounting) of Poisson sampling of clients and the Gaussian mechanism; neighbours "
        "differ in one client, replaced by a null client."
    ),
    plan=_clients_as_records,
    # Plain training: no noise, and a capacity that hardly ever cuts.
    shares=lambda config, sizes, mechanisms: accounting.with_noise(
        sizes, config.schedule.expected_batch_size, 1, 0.0, config.privacy.delta
    ),
    expected=lambda config, sizes, mechanisms: [min(n, config.schedule.expected_batch_size) for n in sizes],
    weights=lambda config, sizes, mechanisms: [1 / len(sizes)] * len(sizes),
    rule=_trusted_server,
    joining=lambda config: config.privacy.client_rate,  # who took part is private
    parties=lambda config: config.schedule.clients + 1,  # the server has a secret too
    steps=lambda config: 1,
    public_uploads=False,
    bare_clients=True,
)

BY_NAME = {record.name: record for record in (LOCAL, DISTRIBUTED, CLIENT, NONE)}


def _clipping(config):
    """How gradients are clipped, in words."""
    return {
        "flat": f"at L2 norm {config.privacy.clip_norm:g}",
        "per_layer": f"of each adapted matrix and the head apart, at L2 norm {config.privacy.clip_norm:g} in all",
        "automatic": f"by normalising to L2 norm {config.privacy.clip_norm:g} (automatic clipping, Bu et al. 2023)",
        "adaptive": f"at a norm that follows a private estimate of the {config.privacy.clip_quantile:g} quantile of norms, from "
        f"{config.privacy.clip_norm:g} on (Andrew et al. 2021)",
    }[config.privacy.clipping]
