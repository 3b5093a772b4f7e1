"""What a run will cost each client, from public sizes alone."""

from typing import NamedTuple

from dplora_jax.federation import calibration, participation, trust
from dplora_jax.privacy import accounting


class ClientPlan(NamedTuple):
    """What a run will do with one client's records, and what that costs it."""

    records: int
    sampling_rate: float
    capacity: int
    noise_multiplier: float
    rounds: int
    epsilon: float


class Plan(NamedTuple):
    """What a run will cost each client, at `delta`."""

    clients: list[ClientPlan]
    delta: float

    def __str__(self):
        lines = [f"{'client':>6}{'records':>9}{'q':>9}{'capacity':>10}{'sigma':>9}{'rounds':>8}{'epsilon':>9}"]
        for k, c in enumerate(self.clients):
            lines.append(
                f"{k:6}{c.records:9}{c.sampling_rate:9.4f}{c.capacity:10}{c.noise_multiplier:9.4f}{c.rounds:8}{c.epsilon:9.4f}"
            )
        return "\n".join([*lines, f"at delta {self.delta:g}"])


def plan(config, sizes):
    """The Plan of `config` for clients of `sizes` records (a list)."""
    mechanisms, steps = calibration.mechanisms(config, sizes), participation.total_steps(config).tolist()
    clients = [
        ClientPlan(
            n, m.sampling_rate, m.capacity, m.noise_multiplier, count // trust.mode(config).steps_per_round(config),
            accounting.epsilon(m, count, config.privacy.delta),
        )
        for n, m, count in zip(sizes, mechanisms, steps, strict=True)
    ]  # fmt: skip
    return Plan(clients, config.privacy.delta)
