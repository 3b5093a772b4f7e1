"""What a run will cost each client, from public sizes alone."""

from typing import NamedTuple

from dplora_jax.federation import calibration, held_out, participation, trust
from dplora_jax.privacy import accounting


class ClientPlan(NamedTuple):
    """What a run will do with one client's records that train, and what that costs each."""

    records: int
    sampling_rate: float
    capacity: int
    noise_multiplier: float
    rounds: int
    epsilon: float


class Plan(NamedTuple):
    """What a run will cost each client, at `delta`; `test` is what scores cost the records that are kept back, if any are, and
    `unit` is what is protected, in a word."""

    clients: list[ClientPlan]
    delta: float
    test: held_out.Cost | None = None
    unit: str = "record"

    @property
    def epsilon(self):
        """The most that any record pays: it trains, or it is kept back."""
        return max([*(client.epsilon for client in self.clients), *([self.test.epsilon] if self.test else [])])

    def __str__(self):
        lines = [f"{'client':>6}{self.unit + 's':>9}{'q':>9}{'capacity':>10}{'sigma':>9}{'rounds':>8}{'epsilon':>9}"]
        for k, c in enumerate(self.clients):
            lines.append(
                f"{k:6}{c.records:9}{c.sampling_rate:9.4f}{c.capacity:10}{c.noise_multiplier:9.4f}{c.rounds:8}{c.epsilon:9.4f}"
            )
        lines.append(f"at delta {self.delta:g}")
        if self.test:
            sigma, epsilon = f"{self.test.noise_multiplier:.4f}", f"{self.test.epsilon:.4f}"
            lines.append(
                f"{sum(self.test.units)} more {self.unit}s are kept back and never train: {self.test.evaluations} evaluations at "
                f"sigma {sigma}, epsilon {epsilon}; a {self.unit} pays for one of the two, at most {self.epsilon:.4f}"
            )
        return "\n".join(lines)


def plan(config, sizes):
    """The Plan of `config` for clients of `sizes` records (a list), those that are kept back included."""
    everyone, sizes = sizes, held_out.training(config, sizes)
    mechanisms, steps = calibration.mechanisms(config, sizes), participation.total_steps(config).tolist()
    clients = [
        ClientPlan(
            n, m.sampling_rate, m.capacity, m.noise_multiplier, count // trust.mode(config).steps_per_round(config),
            accounting.epsilon(m, count, config.privacy.delta),
        )
        for n, m, count in zip(sizes, mechanisms, steps, strict=True)
    ]  # fmt: skip
    share = config.private_test.share
    cost = held_out.cost(config, held_out.kept_back(config, everyone)) if share else None
    return Plan(clients, config.privacy.delta, cost, config.privacy.unit)
