"""Trust mode `client`: a trusted server sees every update and adds the noise; the record is a client's whole update."""

from dplora_jax.federation.trust.mode import HOSTS, Mode
from dplora_jax.privacy import accounting
from dplora_jax.privacy.accounting import Mechanism


def _statements(config, apart):
    """The mode in words: each of `clients` takes part in a round with probability `client_rate`."""
    clients, rate = config.schedule.clients, config.privacy.client_rate
    return (
        "Who sees what: the server is TRUSTED and sees every client's update. The other clients and the public see only each "
        "round's adapter, after the server's noise, and not who took part.",
        "What is protected: one client with all its records, however many. What is seen is about as likely with that client as "
        f"with a null client, whose update is zero, in its place. All {clients} clients have the same epsilon.",
        "What is assumed: the server clips each whole update, weighs all alike, adds the noise and keeps its key. Each client "
        f"takes part in a round independently with probability {rate:g}, and only the server sees whether it did.",
        "Public by assumption: how many clients there are and how many records each has (no weight follows from it), the base "
        "model, the configuration, and the test set, whose owner declares it public.",
        f"Secret by assumption: the server's and the clients' 256-bit keys. {HOSTS}",
    )


def _checks(config):
    delta, rate, clients = config.privacy.delta, config.privacy.client_rate, config.schedule.clients
    yield 0 < rate <= 1, f"client_rate={rate} must lie above 0, at most 1."
    yield (
        delta * clients < 1,
        f"delta={delta:g} with trust=client must be below 1 / clients={clients}: at that delta, publishing one client's records "
        "whole would count as private.",
    )
    yield (
        not config.privacy.by_unit,
        "`privacy_unit` and `unit_rows` cannot be used with trust=client, which hides whole clients: leave them out.",
    )
    yield config.schedule.dropout is None, "`dropout` cannot be used with trust=client: use `client_rate`."


def _clients_as_records(config, sizes, by_client):
    """One mechanism, once for each client: a sample of the clients, one whole update being the record."""
    privacy, clients, noise = config.privacy, config.schedule.clients, config.privacy.noise_multiplier
    if noise is None:
        noise = accounting.least_noise(
            clients, privacy.client_rate, config.schedule.rounds, privacy.epsilon, privacy.delta
        )
    return [Mechanism(clients, privacy.client_rate, clients, noise)] * clients


def _trusted_server(config, mechanisms, sizes, robust):
    from dplora_jax.federation.trusted_server import TrustedServer

    std = mechanisms[0].noise_multiplier * config.privacy.clip_norm
    return TrustedServer(config.privacy.client_rate * config.schedule.clients, config.privacy.clip_norm, std)


MODE = Mode(
    "client",
    statements=_statements,
    method=lambda config, apart: [
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
    steps_per_round=lambda config: 1,
    fields=("client_rate",),
    protects=lambda config: "every client as a whole",
    defaults=lambda config: {"client_rate": 1.0},
    checks=_checks,
    public_uploads=False,
    bare_clients=True,
    apart=False,
)
