"""The ways to clip by name: a new one is a `clipping.Clipper`, and a line here. No JAX until one is made."""

import math
from collections.abc import Callable
from typing import NamedTuple

from dplora_jax.privacy.accounting import MOST_NOISE


class Kind(NamedTuple):
    """`make(privacy)` is the `clipping.Clipper` of a `config.Privacy`, and `words(privacy)` say how it clips. `flat` says whether
    one norm bounds the whole, which serves a client's update too, `moves` whether the norm follows a released count; `fields`
    belong to it alone."""

    make: Callable
    words: Callable
    flat: bool = False
    moves: bool = False
    fields: tuple = ()


def _clip(privacy):
    from dplora_jax.privacy.clipping import Clip

    return Clip(privacy.clip_norm, privacy.clipping)


def _adaptive(privacy):
    from dplora_jax.privacy.adaptive import Adaptive

    return Adaptive(privacy.clip_norm, privacy.clip_quantile, privacy.clip_rate)


KINDS = {
    "flat": Kind(_clip, lambda privacy: f"at L2 norm {privacy.clip_norm:g}", flat=True),
    "per_layer": Kind(
        _clip, lambda privacy: f"of each adapted matrix and the head apart, at L2 norm {privacy.clip_norm:g} in all"
    ),
    "automatic": Kind(
        _clip, lambda privacy: f"by normalising to L2 norm {privacy.clip_norm:g} (automatic clipping, Bu et al. 2023)"
    ),
    "adaptive": Kind(
        _adaptive,
        lambda privacy: (
            f"at a norm that follows a private estimate of the {privacy.clip_quantile:g} quantile of norms, from "
            f"{privacy.clip_norm:g} on (Andrew et al. 2021)"
        ),
        moves=True,
        fields=("count_noise_multiplier",),
    ),
}


def kind(config):
    """The Kind of a run's `config`."""
    return KINDS[config.privacy.clipping]


def checks(config, mode):
    """(holds, what to say if not) for the clipping of `config` under the trust mode `mode` (`trust.mode.Mode`)."""
    clipping, chosen, count = config.privacy.clipping, kind(config), config.privacy.count_noise_multiplier
    yield chosen.flat or math.isfinite(config.privacy.clip_norm), f"clipping={clipping} needs a finite `clip_norm`."
    yield (
        mode.public_uploads or not chosen.moves,
        f"clipping={clipping} cannot be used with trust={mode.name}: it needs a client's own noise to carry its guarantee.",
    )
    yield (
        chosen.flat or not mode.bare_clients,
        f"clipping={clipping} clips examples, and trust={mode.name} clips whole updates: use clipping=flat.",
    )
    yield (
        count is None or 0.03 <= count <= MOST_NOISE,
        f"count_noise_multiplier={count} must be 0.03 to {MOST_NOISE:g}: less would spend any budget.",
    )
