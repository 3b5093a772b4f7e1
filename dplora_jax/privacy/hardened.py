"""Hardened noise: integers from the host's cryptographic generator on sums of integers, which have no low-order bits to read."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dplora_jax import lora
from dplora_jax.errors import InputError
from dplora_jax.privacy import accounting, host_noise, integers, noise, sampling, secrets


class HostDraws:
    """Which records join a step, by the host's draws in place of the device's keys."""

    def rows(self, keys, step, client, records, capacity):
        """As `ByKeys.rows`, from `keys` int32 [local_steps, records], each record's draw."""
        return sampling.chosen(keys[step], client.population, client.join_below, client.capacity, capacity)


@dataclasses.dataclass(frozen=True)
class Hardened(noise.Noise):
    """Integer noise on sums in units of clip_norm 2^-bits."""

    clip_norm: float
    bits: int = dataclasses.field()
    sampler = HostDraws()
    one_scale = True
    pools = False  # integers are not summed by owner

    @classmethod
    def from_config(cls, config, mechanisms, sums, adapter):
        """On the finest grid that int32 sums have room for. Raises InputError where it would be too coarse, and where the
        distance of the draws from a normal's would cost more of delta than the accountant sets aside."""
        integers.check_size(adapter)
        steps = config.schedule.rounds * config.schedule.local_steps
        draws = steps * lora.count(adapter) * max(map(len, sums))
        worst = host_noise.excess_log2(
            draws, max(accounting.epsilon(m, steps, config.privacy.delta) for m in mechanisms)
        )
        if worst > math.log2(accounting.ROUNDING / 100):  # or what an epsilon leaves of delta would not pay for it
            raise InputError(
                f"noise=hardened is exact to 2^{host_noise.DISTANCE_LOG2} a draw, which at this epsilon would add "
                f"2^{worst:.0f} to delta, more than the accountant sets aside: take more noise, or a smaller `epsilon`."
            )
        return cls(config.privacy.clip_norm, integers.bits_for(sums))

    def check(self, local):
        """Sums are integers of one grid, and nothing needs the device's keys, of which there are none."""
        super().check(local)
        if local.clipper.clip_norm != self.clip_norm:
            raise ValueError(
                f"integer noise is in units of the clip norm: {self.clip_norm:g} is not {local.clipper.clip_norm:g}."
            )
        if local.upload.draws:
            raise ValueError("uploads are rounded by device keys, and with the host's noise there are none.")

    def add(self, sums, stds, keys, step, memory):
        """integer sums + `keys`' integers of this step, int32; `keys` are the noise itself, [local_steps, ...]."""
        by_path = dict(jax.tree.leaves_with_path(keys))  # of a whole adapter, of which a half may be trained
        total, count = sums
        drawn = jax.tree.map_with_path(lambda path, _: by_path[path][step], total)
        return (jax.tree.map(jnp.add, total, drawn), count), memory

    def value(self, sums):
        """In units of clip_norm 2^-bits."""
        return integers.value(sums, self.clip_norm, self.bits)

    def words(self):
        """The grid, and the generator."""
        return [
            f"gradients cut to integers of clip_norm 2^-{self.bits}, and integer noise drawn on the host from SHAKE-256"
        ]

    def round_keys(self, party_secrets, numbers, attempt, clients, rate, local, shares, adapter):
        """`host_noise.round_draws` of noise in units of the grid."""
        stds = [m.noise_multiplier * 2.0**self.bits for m in shares]
        drawn = host_noise.round_draws(party_secrets, numbers, attempt, local.local_steps, adapter, stds, local.records)
        return drawn if rate is None else drawn | {"joins": secrets.joins(party_secrets, numbers, attempt, rate)}

    def key_shapes(self, parties, clients, rate, local, adapter):
        """The draws' own: drawing them would take long."""
        shape = 1, clients, local.local_steps
        drawn = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*shape, *x.shape), jnp.int32), adapter)
        shapes = {"noise": drawn, "sampling": jax.ShapeDtypeStruct((*shape, local.records), jnp.int32)}
        return shapes if rate is None else shapes | {"joins": jax.ShapeDtypeStruct((1, clients), jnp.float32)}

    def most_rounds(self, clients, parameters, local):
        """As many as their noise has room on the host."""
        return host_noise.most_rounds(clients, local.local_steps, parameters, local.records)
