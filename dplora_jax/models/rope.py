"""Rotary positions (RoPE, Su et al. 2021): the frequencies that config.json asks for, in every scaling that no row shares.

Letters: B rows, T tokens, K head width, R numbers of a head that turn.
"""

import dataclasses
import math

from dplora_jax.errors import InputError
from dplora_jax.models.family import given, number, refuse_unsupported
from dplora_jax.models.layers import rotation

SCALINGS = ("default", "linear", "llama3", "yarn", "longrope")
GLOBAL, LOCAL = "full_attention", "sliding_attention"  # config.json's names of the two kinds of layers


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies [R/2] in radians a position, scaling included, of a head's first R numbers; the others do not turn. `scale`
    multiplies what is turned. Rows of more than `short` tokens turn by `long` [R/2] instead (LongRoPE, Ding et al. 2024)."""

    frequencies: tuple[float, ...]
    scale: float = 1.0
    long: tuple[float, ...] | None = None
    short: int = 0

    def turn(self, positions_BxT, tokens):
        """(cos, sin) [B, T, 1, R/2] float32 in rows of `tokens` places. LongRoPE's choice is the shape's alone: transformers
        takes the longest row of a batch, which would let one row change another."""
        longer = self.long is not None and tokens > self.short
        cos, sin = rotation(positions_BxT, self.long if longer else self.frequencies)
        return (cos, sin) if self.scale == 1 else (self.scale * cos, self.scale * sin)


def read(hf, head_width, partial=None):
    """The Rope of heads of `head_width` that config.json `hf` asks for, in its old or its new spelling.

    `linear` divides all frequencies by its factor (Chen et al. 2023); `llama3` only the slow ones, with a ramp between (Llama
    3.1); `yarn` ramps by the turns that a frequency makes within the first length (Peng et al. 2023); `longrope` has a factor for
    each. `dynamic` is refused: it looks at the longest row of a batch, and no row may see another. `partial` is the share of a
    head that turns where `hf` does not say; None refuses any but all. Raises InputError on others.
    """
    # Of the two spellings, transformers takes the older, whole: nothing of the other adds to it, not even its rope_theta.
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise InputError(f"config.json: the rope scaling {scaling!r} is not one set of options for all layers.")
    if partial is None:
        refuse_unsupported(scaling, {"partial_rotary_factor": (None, 1, 1.0)})  # where transformers 5 writes it
    share = number(
        given(hf, "partial_rotary_factor") | given(scaling, "partial_rotary_factor"),
        "partial_rotary_factor",
        partial or 1.0,
    )
    width = int(head_width * share)
    if share > 1 or width < 2 or width % 2:
        raise InputError(
            f"config.json: partial_rotary_factor={share!r} turns {width} numbers of a head of {head_width}."
        )
    theta = number(given(hf, "rope_theta") | given(scaling, "rope_theta"), "rope_theta", 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    # A length beside the options wins over theirs; where neither has one, all positions count.
    length = {"original_max_position_embeddings": hf.get("max_position_embeddings")} | scaling
    scaling = length | given(hf, "original_max_position_embeddings")
    if kind not in (*SCALINGS, "frequency_factors"):
        raise InputError(
            f"config.json: rope_type={kind!r} is not supported, only {', '.join(SCALINGS[:-1])} or {SCALINGS[-1]}."
        )
    try:
        found = _scaled(kind, [theta ** (-2 * i / width) for i in range(width // 2)], theta, width, hf, scaling)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        raise InputError(f"config.json: the rope scaling {scaling} is incomplete.") from None
    if not all(map(math.isfinite, (*found.frequencies, *(found.long or ()), found.scale))):
        raise InputError(f"config.json: the rope scaling {scaling} makes angles that are not finite.")
    return found


def _scaled(kind, base, theta, width, hf, scaling):
    """The Rope that the options `scaling` make of the frequencies `base`."""
    if kind == "default":
        return Rope(tuple(base))
    if kind == "linear":
        return Rope(tuple(f / scaling["factor"] for f in base))
    if kind == "frequency_factors":  # of a GGUF file
        return Rope(_divided(base, scaling["factors"]))
    if kind == "llama3":
        return Rope(tuple(_llama3(f, scaling) for f in base))
    if kind == "yarn":
        return _yarn(base, theta, width, scaling)
    return _longrope(base, hf, scaling)


def read_kind(hf, head_width, kind, theta, scaled=True):
    """The Rope of the layers of `kind` (GLOBAL or LOCAL), where config.json `hf` has options for each kind, or the older
    spelling: one `rope_scaling`, which counts for this kind if `scaled`. `theta` is the base where the options have none."""
    named = hf.get("rope_parameters") or {}
    if set(named) - {GLOBAL, LOCAL} or not all(isinstance(named.get(name) or {}, dict) for name in named):
        raise InputError(f"config.json: rope_parameters={named!r} must have options for {GLOBAL} and {LOCAL}.")
    options = {"rope_theta": theta} | (named.get(kind) or {}) | ((hf.get("rope_scaling") or {}) if scaled else {})
    return read({"rope_parameters": options} | given(hf, "max_position_embeddings"), head_width)


def _divided(base, divisors):
    return tuple(f / divisor for f, divisor in zip(base, divisors, strict=True))


def _llama3(frequency, scaling):
    """One frequency: kept where its wave is short, divided where it is long, blended between."""
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    waves = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    share = min(max((waves - low) / (high - low), 0.0), 1.0)
    return (1 - share) * frequency / factor + share * frequency


def _yarn(base, theta, width, scaling):
    """Frequencies that turn often within the first length stay, those that turn hardly are divided, with a ramp between; what is
    turned grows with the factor's logarithm (Peng et al. 2023, section 3)."""
    factor, length = scaling["factor"], scaling["original_max_position_embeddings"]

    def place(turns):
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def growth(weight=1.0):
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    low, high = place(scaling.get("beta_fast") or 32), place(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high
    share = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(len(base))]
    scale, up, down = (scaling.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if scale is None:
        scale = growth(up) / growth(down) if up and down else growth()
    return Rope(tuple(f * (s / factor + 1 - s) for f, s in zip(base, share, strict=True)), float(scale))


def _longrope(base, hf, scaling):
    """A divisor for each frequency, one set up to the first length and another beyond; what is turned grows with how many times
    that length the model reads (Ding et al. 2024)."""
    short, scale, factor = (
        scaling.get(name) for name in ("original_max_position_embeddings", "attention_factor", "factor")
    )
    factor = hf["max_position_embeddings"] / short if factor is None else factor
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(short))
    return Rope(
        _divided(base, scaling["short_factor"]), float(scale), _divided(base, scaling["long_factor"]), int(short)
    )
