"""Trust mode `client`: the server is trusted, and a client's whole update is the record (McMahan et al. 2018, algorithm 1)."""

import dataclasses

import jax

from dplora_jax.federation import aggregation
from dplora_jax.privacy import clipping, noise


@dataclasses.dataclass(frozen=True)
class TrustedServer(aggregation.Mean):
    """Each update is clipped to `clip_norm`; the sum of those who joined gets noise of `noise_std`, and is divided by `divisor`,
    how many are expected to. All three are public and fixed before the run."""

    divisor: float
    clip_norm: float
    noise_std: float
    keys = ("joins", "server")

    def total(self, rounds, group, done):
        """The sum of clipped updates of those who joined."""
        clipped = clipping.clip_each(done.upload, self.clip_norm)
        return aggregation.joined_total(group, done._replace(upload=clipped, terms=clipped))

    def settle(self, rounds, terms, weight, state, shown, server_keys):
        """The noisy mean."""
        mean = self.noisy_mean(terms, server_keys)
        return aggregation.Settled(mean, state.residual, {"aggregate": mean})

    def next(self, settled, new, state):
        """The new state: a round that no one joined counts like others, and shows noise alone."""
        return new

    def noisy_mean(self, total, keys):
        """(sum of clipped updates + the server's noise) / the expected number of clients; `keys` [4, 2] uint32 are the server's
        of this round."""
        noisy = noise.add(total, noise.gaussian(keys, total, self.noise_std, 0))
        return jax.tree.map(lambda x: x / self.divisor, noisy)
