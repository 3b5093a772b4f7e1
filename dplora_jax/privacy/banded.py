"""Noise that is correlated over the local steps of a round, so that their sum holds less of it."""

import dataclasses

import jax

from dplora_jax.privacy import noise, sampling


def streaming_matrix(steps, bands):
    """Noise C^-1 z over `steps` local steps, z independent, for a lower triangular C of `bands` bands whose columns have norm 1
    (banded matrix factorisation, Choquette-Choo et al. 2023, algorithm 9) -> jax_privacy's StreamingMatrix: its
    `init_multiply(tree)` gives a memory, and `multiply_next(noise, memory)` a step's correlated noise and the next memory.

    C's bands are the coefficients of (1 - x)^-1/2, the best there are for the largest error of a running sum (Fichtenberger
    et al. 2023), cut off and normalised.
    """
    from jax_privacy.matrix_factorization import banded as factorization  # slow to import; most runs need none of it

    with jax.ensure_compile_time_eval():
        return factorization.ColumnNormalizedBanded.default(steps, bands).inverse_as_streaming_matrix()


@dataclasses.dataclass(frozen=True)
class Parts:
    """Step t samples from the records whose index is t modulo `bands`: no two steps of `bands` in a row see one record."""

    bands: int

    def rows(self, keys, step, client, records, capacity):
        """(rows [capacity] int32, weights [capacity] of 0 or 1) of the step's part."""
        rows, weights = sampling.ByKeys(self.bands).rows(keys, step, client, records, capacity)
        return rows * self.bands + step % self.bands, weights


@dataclasses.dataclass(frozen=True)
class Banded(noise.Noise):
    """Noise correlated over `bands` of a round's `steps`."""

    steps: int
    bands: int
    one_scale = True

    @classmethod
    def from_config(cls, config, mechanisms, sums, adapter):
        """As `config` has local steps and bands."""
        return cls(config.schedule.local_steps, config.privacy.bands)

    @property
    def sampler(self):
        """Each step has its own part of the records."""
        return Parts(self.bands)

    def check(self, local):
        """Turns of the parts are whole, and the scale stays."""
        super().check(local)
        if local.local_steps != self.steps or self.steps % self.bands:
            raise ValueError(
                f"bands ({self.bands}) must divide local_steps ({local.local_steps}), the noise's own ({self.steps}): it is "
                "accounted over whole turns of the parts."
            )

    def init(self, adapter):
        """The memory before the first step; beside the gradients' sum there is no count, whose scale would move."""
        return streaming_matrix(self.steps, self.bands).init_multiply((adapter, {}))

    def add(self, sums, stds, keys, step, memory):
        """`sums` plus this step's noise, which takes away some of the last ones'."""
        drawn = noise.gaussian(keys, sums, stds, step)
        drawn, memory = streaming_matrix(self.steps, self.bands).multiply_next(drawn, memory)
        return noise.add(sums, drawn), memory

    def words(self):
        """How many steps are correlated, and what each of them samples from."""
        return [
            f"noise correlated over {self.bands} local steps (banded matrix factorisation, Choquette-Choo et al. 2023), "
            f"each of them on its own {self.bands}th of a client's records"
        ]
