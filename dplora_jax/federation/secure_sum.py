"""Trust mode `distributed`: the server sees the total of the clients' noisy sums and no upload by itself (simulated here)."""

import dataclasses

import jax
import jax.numpy as jnp

from dplora_jax.federation import aggregation, client


@dataclasses.dataclass(frozen=True)
class SecureSum(aggregation.Mean):
    """The total over `divisor` (the sum of all expected batches), if at least `survivors` clients sent their part of it; both are
    public and fixed before the run. The client's transformation runs at the server, on the mean gradient, and has no memory."""

    divisor: float
    survivors: int
    keys = ("joins",)

    def check(self, rounds):
        """Only the total carries enough noise to be looked at: nothing may step on, round or weigh one client's sum."""
        if rounds.local.local_steps != 1 or rounds.local.upload.draws:
            raise ValueError("only a total of shares carries enough noise: one local step, and uploads as they are.")

    def train(self, rounds, sums, began, member):
        """A client's share of the total: one step's clipped sum and its part of the noise, undivided."""
        local, memory = rounds.local, rounds.local.noise.init(began)
        undivided = member.client._replace(divisor=1.0)
        noisy, kept, _, trace = client.noisy_sum(
            local, sums, began, undivided, member.keys, 0, member.clip_norm, memory
        )
        return noisy, jax.tree.map(lambda x: x[None], trace), kept

    def total(self, rounds, group, done):
        """The sum of the shares of those who send."""
        return aggregation.joined_total(group, done)

    def settle(self, rounds, terms, weight, state, shown, server_keys):
        """The step on the mean gradient; a round of too few survivors is void, and releases nothing."""
        sent = weight >= self.survivors
        gradient = jax.tree.map(lambda x: jnp.where(sent, x / self.divisor, 0), rounds.local.noise.value(terms))
        optimizer = rounds.client_optimizer
        mean = optimizer.update(gradient, optimizer.init(state.adapter), state.adapter)[0]
        return aggregation.Settled(mean, state.residual, {"aggregate": gradient}, sent)
