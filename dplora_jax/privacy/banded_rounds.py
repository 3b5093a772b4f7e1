"""Noise that is correlated over rounds: a later round takes back a part of earlier rounds' noise (DP-FTRL).

No noise is kept. The earlier rounds of a block draw theirs again from their own keys, which derive from the client's secret and
the ledger's entries, so round t of a block costs t draws of the adapter's size, and memory for `bands` of them.

Letters: K clients, T planned rounds.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dplora_jax.privacy import noise
from dplora_jax.privacy.banded import Parts

KEY_BYTES = 64 << 20  # of a dispatch's keys: each round has those of its whole block


def coefficients(bands, momentum):
    """The bands of C, float32 [bands], the same in every column: C is lower triangular, and its columns have norm at most 1.

    They are the first coefficients of ((1 - x) (1 - momentum x))^-1/2, normalised (Kalinin and Lampert 2024, arXiv 2405.13763):
    C squared would be what the adapter remembers of each round under that momentum. They fall, so that C^-1 stays small. Python's
    own arithmetic makes them, on every machine the same; each is rounded down, so that float32 makes no column longer.
    """

    def root(rate):
        return list(itertools.accumulate(range(1, bands), lambda c, k: c * rate * (k - 0.5) / k, initial=1.0))

    plain, moving = root(1.0), root(momentum)
    both = [math.fsum(plain[i] * moving[k - i] for i in range(k + 1)) for k in range(bands)]
    norm = math.sqrt(math.fsum(c * c for c in both))
    return np.nextafter(np.array([c / norm for c in both], np.float32), np.float32(0))


@dataclasses.dataclass(frozen=True)
class RoundParts:
    """The round at place p of its block samples from the records whose index is p modulo `bands`."""

    bands: int

    def rows(self, keys, step, client, records, capacity):
        """As `Parts.rows`, by the `keys` {"keys": uint32 [4, 2], "place": int32} of a round."""
        return Parts(self.bands).rows(keys["keys"], keys["place"], client, records, capacity)


@dataclasses.dataclass(frozen=True)
class BandedRounds(noise.Noise):
    """Noise correlated over `bands` of the planned `rounds`, for a server of this `momentum`."""

    rounds: int
    bands: int
    momentum: float = 0.0
    one_scale = True
    over_rounds = True

    @classmethod
    def from_config(cls, config, mechanisms, sums, adapter):
        """As `config` has rounds, bands and momentum: C follows from public settings alone."""
        return cls(config.schedule.rounds, config.privacy.bands, config.aggregation.server_momentum)

    @property
    def sampler(self):
        """Each round has its own part of the records."""
        return RoundParts(self.bands)

    def check(self, local):
        """A round is one step, and nothing else draws from its keys."""
        super().check(local)
        if local.local_steps != 1:
            raise ValueError(f"noise over rounds takes one local step in each, and local_steps is {local.local_steps}.")
        if local.upload.draws:
            raise ValueError("uploads are rounded by the keys of one round, and this noise has those of several.")

    def add(self, sums, stds, keys, step, memory):
        """`sums` plus y_t of C y = z, times `stds`; z_s are standard normals of round s's own key.

        `keys` are {"keys": uint32 [T, 4, 2] of the rounds of the block, "place": int32, how many came before this one}."""
        first, *rest = (float(c) for c in coefficients(self.bands, self.momentum))

        def draw(place, past):
            drawn = noise.gaussian(keys["keys"][place], sums, stds, step)
            return jax.tree.map(lambda z, past: jnp.concatenate([_next(z, past)[None], past[:-1]]), drawn, past)

        def _next(z, past):
            return (z - sum(c * past[i] for i, c in enumerate(rest))) / first

        past = jax.tree.map(lambda x: jnp.zeros((self.bands - 1, *x.shape), jnp.float32), sums)
        past = jax.lax.fori_loop(0, keys["place"] + 1, draw, past)  # the newest first
        return noise.add(sums, jax.tree.map(lambda x: x[0], past)), memory

    def words(self):
        """How many rounds are correlated, and what each of them samples from."""
        return [
            f"noise correlated over {self.bands} rounds (banded matrix factorisation, Choquette-Choo et al. 2023), each of them "
            f"on its own {self.bands}th of a client's records"
        ]

    def going_on(self, keys, earlier):
        """The keys of a dispatch, each round with the noise keys of its block [rounds, K, T, 4, 2] and its place [rounds, K]."""
        drawn = np.concatenate([*earlier, keys["noise"]])
        count, clients = keys["noise"].shape[:2]
        block = np.pad(drawn, [(0, self.rounds - len(drawn)), *[(0, 0)] * 3]).swapaxes(0, 1)
        places = np.arange(len(drawn) - count, len(drawn), dtype=np.int32)
        place = np.broadcast_to(places[:, None], (count, clients))
        return keys | {
            "noise": {"keys": np.broadcast_to(block, (count, *block.shape)), "place": place},
            "sampling": {"keys": keys["sampling"], "place": place},
        }

    def most_rounds(self, clients, parameters, local):
        """As many as their keys have room."""
        return max(1, KEY_BYTES // (32 * clients * self.rounds))
