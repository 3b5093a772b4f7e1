"""A clip norm that follows a quantile of the gradients' norms, estimated privately (Andrew et al. 2021, algorithm 1).

A step releases, beside the noisy sum of gradients, a noisy sum over sampled records of 1/2 where the norm is within the clip
norm and -1/2 where it is beyond. A null record adds nothing, so one record moves that sum by at most 1/2, and both sums
are one Gaussian event (`accounting.joint_multiplier`).
"""

import dataclasses

import jax.numpy as jnp

from dplora_jax.privacy import clipping
from dplora_jax.privacy.accounting import CLIP_NORMS


def centred_count(norms, clip_norm, weights):
    """Sum over rows of w_i (1/2 if |g_i| <= clip_norm, else -1/2) -> float32; `norms` [B] as `clipped_grad_sum` reports them.

    A row whose gradient is not finite adds nothing, as it adds nothing to the gradients' sum.
    """
    bits = jnp.where(norms <= clip_norm, 0.5, -0.5)
    return jnp.where(jnp.isfinite(norms) & (weights > 0), weights * bits, 0).sum()


def next_norm(clip_norm, noisy_count, divisor, quantile, rate):
    """clip_norm exp(-rate (b - quantile)), with b = noisy_count / divisor + 1/2 the share of records within the clip norm;
    `divisor` is the public expected batch size. Kept within `accounting.CLIP_NORMS`, and what is not a number changes nothing."""
    moved = clip_norm * jnp.exp(-rate * (noisy_count / divisor + 0.5 - quantile))
    return jnp.where(jnp.isnan(moved), clip_norm, jnp.clip(moved, *CLIP_NORMS))


@dataclasses.dataclass(frozen=True)
class Adaptive(clipping.Clipper):
    """Rows cut to a norm that each client moves towards the `quantile` of its norms at `rate`, from `clip_norm` on."""

    clip_norm: float
    quantile: float = 0.5
    rate: float = 0.2
    form: str = "auto"
    moves = True
    pools = False  # clients' norms differ

    def kept(self, clients):
        """Each client's clip norm before round 1 [K] float32."""
        return jnp.full(clients, self.clip_norm, jnp.float32)

    def norm(self, kept):
        """The norm that a client's next step clips to."""
        return kept

    def sum(self, loss_fn, adapter, batch, weights, clip_norm, **how):
        """`clipping.clipped_grad_sum`, flat."""
        return clipping.clipped_grad_sum(loss_fn, adapter, batch, clip_norm, weights, self.form, "flat", **how)

    def count(self, norms, clip_norm, weights):
        """{"count": `centred_count`}: one leaf more of what is noised."""
        return {"count": centred_count(norms, clip_norm, weights)}

    def stds(self, client, clip_norm):
        """The gradients' noise follows the clip norm, the count's does not."""
        return client.noise_std * (clip_norm / self.clip_norm), client.count_std

    def move(self, kept, count, divisor):
        """The clip norm of the next step, from the noisy count alone."""
        return next_norm(kept, count["count"], divisor, self.quantile, self.rate)
