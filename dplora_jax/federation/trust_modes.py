"""What a trust mode makes of a configuration: what each client does itself, and the server's rule."""

import dataclasses
import math

from dplora_jax.federation import aggregation_checks
from dplora_jax.federation.aggregation import Rule
from dplora_jax.privacy import accounting, trust
from dplora_jax.privacy.secrets import joins


def honest(config):
    """h: the clients that surely send, less those assumed to collude; their noise alone is counted on."""
    return config.privacy.survivors - config.privacy.colluding


def own(config, sizes, mechanisms):
    """What each client does itself, as Mechanisms: its sampling of its own records, and the noise that it adds."""
    if config.privacy.trust == "distributed":
        share = 1 / math.sqrt(honest(config))
        return [dataclasses.replace(m, noise_multiplier=m.noise_multiplier * share) for m in mechanisms]
    if config.privacy.trust == "client":  # plain training: no noise, and a capacity that hardly ever cuts
        return accounting.with_noise(sizes, config.schedule.expected_batch_size, 1, 0.0, config.privacy.delta)
    return mechanisms


def expected_batches(config, sizes, mechanisms):
    """How many of its own records each client expects in a local step's batch."""
    if config.privacy.trust == "client":  # its mechanisms are of clients
        return [min(n, config.schedule.expected_batch_size) for n in sizes]
    return [m.sampling_rate * n for m, n in zip(mechanisms, sizes, strict=True)]


def rule(config, mechanisms, sizes):
    """The server's part of a round."""
    if config.privacy.trust == "distributed":
        return Rule("distributed", sum(expected_batches(config, sizes, mechanisms)), config.privacy.survivors)
    if config.privacy.trust == "client":
        expected = config.privacy.client_rate * config.schedule.clients
        std = mechanisms[0].noise_multiplier * config.privacy.clip_norm
        return Rule("client", expected, clip_norm=config.privacy.clip_norm, noise_std=std)
    return Rule(config.privacy.trust)


def joining(config):
    """The probability with which a client takes part in a round; None where all always do."""
    if config.privacy.trust == "distributed":
        return 1 - config.schedule.dropout
    return config.privacy.client_rate if config.privacy.trust == "client" else None


def examples(config, sizes, mechanisms):
    """The expected count of records in a round's batches: public, unlike the count that was drawn."""
    return (joining(config) or 1) * config.schedule.local_steps * sum(expected_batches(config, sizes, mechanisms))


def senders(config, secrets, rounds, attempt):
    """What metrics tell of who took part, a dict a round: in mode `distributed` how many sent their sum, and whether the round
    was void, both public there; in mode `client` it is private."""
    if config.privacy.trust != "distributed":
        return [{}] * len(rounds)
    sent = joins(secrets, rounds, attempt, joining(config)).sum(1)
    return [{"survivors": int(count), "void": bool(count < config.privacy.survivors)} for count in sent]


def parties(config):
    """How many secrets a run has: one a client, and in mode `client` the server's."""
    return config.schedule.clients + (config.privacy.trust == "client")


def weights(config, sizes, mechanisms):
    """Each client's share of the mean, if all take part."""
    if config.privacy.trust == "client":
        return [1 / len(sizes)] * len(sizes)
    parts = expected_batches(config, sizes, mechanisms) if config.privacy.trust == "distributed" else sizes
    return [part / sum(parts) for part in parts]


def statements(config):
    """The mode in words."""
    if config.privacy.trust == "distributed":
        return trust.distributed(config.schedule.clients, config.privacy.survivors, config.privacy.colluding)
    if config.privacy.trust == "client":
        return trust.client(config.schedule.clients, config.privacy.client_rate)
    return trust.LOCAL if config.privacy.private else trust.NONE


def method(config):
    """How gradients or updates are clipped, and how they are put together: two lines."""
    clipped = f"DP-LoRA (arXiv 2312.17493), per-example clipping {_clipping(config)}"
    if config.privacy.trust == "distributed":
        return [clipped, "sum of noisy sums (secure aggregation, simulated) over the sum of expected batches"]
    if config.privacy.trust == "client":
        return [
            f"DP-FedAvg (McMahan et al. 2018) of LoRA: each client's whole update clipped at L2 norm {config.privacy.clip_norm:g}",
            "uniform weights, noise at the server, over the expected number of clients",
        ]
    return [clipped if config.privacy.private else "Federated LoRA, no noise", *_aggregation(config)]


def _aggregation(config):
    """How uploads are put together, in words: a line for each flag that says so."""
    lines = [
        {
            "fedavg": "FedAvg of A and B, weighted by n_k / n",
            "rolora": "B and A trained in turn, each with an exact mean weighted by n_k / n (RoLoRA)",
            "fedsa": "A averaged, weighted by n_k / n, every client's B kept to itself (FedSA-LoRA)",
            "fedex": "FedAvg of A and B, and what their product misses of the mean product folded into the base (FedEx-LoRA)",
            "flora": "the clients' stacked adapters folded into the base after each round (FLoRA)",
            "flexlora": "the mean product factored anew by singular values (FlexLoRA)",
        }[config.aggregation.method]
    ]
    if config.aggregation.robust != "none":
        lines = [
            f"{config.aggregation.robust.replace('_', ' ')} of each coordinate, every client counting the same (Yin et al. 2018)"
        ]
    if config.lora.ranks is not None:
        lines.append(f"clients of ranks {config.lora.ranks}")
    if config.schedule.participation != "all":
        lines.append(
            f"participation {config.schedule.participation} by a public schedule: each client pays for its own rounds"
        )
    if config.schedule.dropout:
        lines.append(
            f"clients fail to send with probability {config.schedule.dropout:g} (simulated), and pay all the same"
        )
    if config.optimizer.proximal:
        lines.append(f"FedProx, strength {config.optimizer.proximal:g}")
    of_head = " on the head alone" if config.aggregation.method in aggregation_checks.WHOLE else ""
    if config.aggregation.server_optimizer != "sgd":
        lines.append(
            f"Fed{config.aggregation.server_optimizer.capitalize()} at the server{of_head} (Reddi et al. 2021)"
        )
    if config.aggregation.server_momentum and of_head:
        lines.append(f"server momentum {config.aggregation.server_momentum:g}{of_head}")
    if config.aggregation.upload_bits:
        lines.append(f"uploads rounded at random to {config.aggregation.upload_bits} bits a number")
    return lines


def _clipping(config):
    """How gradients are clipped, in words."""
    return {
        "flat": f"at L2 norm {config.privacy.clip_norm:g}",
        "per_layer": f"of each adapted matrix and the head apart, at L2 norm {config.privacy.clip_norm:g} in all",
        "automatic": f"by normalising to L2 norm {config.privacy.clip_norm:g} (automatic clipping, Bu et al. 2023)",
        "adaptive": f"at a norm that follows a private estimate of the {config.privacy.clip_quantile:g} quantile of norms, from "
        f"{config.privacy.clip_norm:g} on (Andrew et al. 2021)",
    }[config.privacy.clipping]


def accounted_as(config):
    """The sentence on the accounting."""
    if config.privacy.trust == "client":
        return (
            "Privacy loss distributions (dp_accounting) of Poisson sampling of clients and the Gaussian mechanism; neighbours "
            "differ in one client, replaced by a null client."
        )
    return (
        "Privacy loss distributions (dp_accounting) of Poisson sampling with a fixed capacity and the Gaussian mechanism; "
        "neighbours differ in one record, replaced by a null record."
    )
