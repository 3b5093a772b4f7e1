"""From flags to the program of a run: its adapter, its optimizers and the static part of the rounds.

A run and a plan of one make the same program here.
"""

import math

import jax
import optax

from dplora_jax import lora, per_row
from dplora_jax.errors import InputError
from dplora_jax.federation import (
    aggregation,
    aggregation_checks,
    methods,
    participants,
    pool,
    robust,
    round,
    trust_modes,
)
from dplora_jax.federation.client import LocalConfig
from dplora_jax.privacy import accounting, clipping, host_noise, integers

MOST_POOLED, POOLED_BYTES = 8, 256 << 20  # clients of a wave, and bytes of their uploads, unless `wave` says otherwise
# Decay of the server's first and second moments, and what is added to the root (Reddi et al. 2021, section 5.1: tau 1e-3).
MOMENTS = (0.9, 0.99, 1e-3)


def adapter(config, model, params):
    """(adapter, params, LoraConfig); the adapter's start is public, so a fixed key serves when there is no seed."""
    lora_config = lora.LoraConfig(
        config.lora.rank, config.lora.alpha, config.lora.trained_targets, config.lora.last_layers
    )
    try:
        fresh = lora.init(jax.random.key(config.privacy.seed or 0), model, params, lora_config)
    except ValueError as error:
        raise InputError(str(error)) from None
    if config.lora.freeze_a:
        params, fresh = lora.freeze_a(params, fresh)
    return fresh, params, lora_config


def federation(config, model, loss, mechanisms, adapter, placement, wave=1, streamed=False):
    """The static part of the rounds (`round.Federation`) for clients that lie as `placement` says, `wave` at a time."""
    plain = config.privacy.trust == "client"  # there, clipping and noise are the server's
    local = LocalConfig(
        config.schedule.local_steps,
        math.inf if plain else config.privacy.clip_norm,
        placement.records,
        placement.capacity,
        microbatch=config.execution.microbatch,
        private=config.privacy.private and not plain,
        clipping=config.privacy.clipping,
        quantile=config.privacy.clip_quantile,
        quantile_rate=config.privacy.clip_rate,
        bands=config.privacy.bands or 1,
        bits=bits(config, mechanisms, adapter),
        ranks=config.lora.ranks is not None,
        upload_bits=config.aggregation.upload_bits,
        pool=_pool(config, mechanisms, model, adapter, wave),
    )
    method = methods.BY_NAME[config.aggregation.method]
    if config.lora.ranks is not None and config.aggregation.method == "fedavg":
        method = methods.padded(config.lora.rank)
    return round.Federation(
        model,
        loss,
        local,
        *optimizers(config),
        ema=config.aggregation.ema,
        wave=wave,
        rule=trust_modes.rule(config, mechanisms, placement.sizes),
        method=method,
        robust=_robust(config.aggregation.robust),
        partial=participants.partial(config),
        streamed=streamed,
    )


def _robust(spec):
    """The robust mean that `robust` names, or None."""
    kind, _, share = spec.partition(":")
    return {"none": None, "median": robust.median, "trimmed_mean": robust.trimmed_mean(float(share or 0))}[kind]


def wave(config, grid, model, adapter):
    """How many clients a device computes at a time: as flagged, else, where they can pool their rows, as many as it has, in waves
    of one size of up to MOST_POOLED clients whose uploads fit POOLED_BYTES."""
    if config.execution.wave is not None:
        return min(config.execution.wave, config.schedule.clients)
    if not _poolable(config, model, adapter):
        return 1
    each = -(-config.schedule.clients // grid.shape[aggregation.CLIENTS])
    most = max(1, min(MOST_POOLED, POOLED_BYTES // (4 * lora.count(adapter))))
    return -(-each // -(-each // most))


def _poolable(config, model, adapter):
    """Whether all clients' rows of a round go through one adapter, and are clipped to one norm (else the round refuses a pool),
    and rows' gradients, which pooled rows have, are the better way to every matrix's sum."""
    kept = (
        per_row.keeps_less(config.data.max_length, *leaf.shape[1:], model.dtype)
        for leaf in jax.tree.leaves(adapter.get("layers", {}))
    )
    return not any(kept) and (
        config.schedule.local_steps == 1
        and config.privacy.trust != "client"
        and math.isfinite(config.privacy.clip_norm)
        and config.privacy.clipping != "adaptive"
        and config.privacy.noise != "hardened"
        and config.lora.ranks is None
        and not methods.BY_NAME[config.aggregation.method].keeps_b
        and not participants.partial(config)
    )


def _pool(config, mechanisms, model, adapter, wave):
    """The rows that a wave's clients fill together, the fullest wave's; None where they do not pool them."""
    if wave == 1 or not _poolable(config, model, adapter):
        return None
    waves = (mechanisms[first : first + wave] for first in range(0, len(mechanisms), wave))
    rows = max(map(pool.rows, waves))
    most = config.execution.microbatch or max(m.capacity for m in mechanisms)
    fits = 4 * pool.at_a_time(rows, most) * lora.count(adapter) <= clipping.ONE_PASS_BYTES
    return rows if fits else None


def bits(config, mechanisms, adapter):
    """How fine the grid of hardened noise is; None for other noise."""
    if config.privacy.noise != "hardened":
        return None
    integers.check_size(adapter)
    worst = host_noise.excess_log2(
        config.schedule.rounds * config.schedule.local_steps * lora.count(adapter),
        max(
            accounting.epsilon(m, config.schedule.rounds * config.schedule.local_steps, config.privacy.delta)
            for m in mechanisms
        ),
    )
    if worst > math.log2(accounting.ROUNDING / 100):  # or what an epsilon leaves of delta would not pay for it
        raise InputError(
            f"noise=hardened is exact to 2^{host_noise.DISTANCE_LOG2} a draw, which at this epsilon would add 2^{worst:.0f} to "
            "delta, more than the accountant sets aside: take more noise, or a smaller `epsilon`."
        )
    return integers.bits_for(mechanisms)


def optimizers(config):
    """(client's, server's) optax transformations: a learning rate for each part, momentum at the server.

    The clients' rates are constant within a round; their fall over the rounds, a factor on every upload, is the server's.
    """
    make = {"sgd": optax.sgd, "adam": optax.adam}[config.optimizer.client_optimizer]
    client = aggregation.groups({"layers": make(config.optimizer.client_lr), "head": make(config.optimizer.head_lr)})
    if config.optimizer.proximal:
        client = optax.chain(aggregation.proximal(config.optimizer.proximal), client)
    rate = optax.linear_schedule(
        config.aggregation.server_lr, config.aggregation.server_lr * config.optimizer.lr_decay, config.schedule.rounds
    )
    momentum = (
        optax.trace(config.aggregation.server_momentum) if config.aggregation.server_momentum else optax.identity()
    )
    server = {
        "sgd": momentum,
        "adam": optax.scale_by_adam(*MOMENTS),
        "yogi": optax.scale_by_yogi(*MOMENTS),
        "adagrad": optax.scale_by_rss(initial_accumulator_value=0.0, eps=MOMENTS[2] ** 2),  # it stands inside the root
    }[config.aggregation.server_optimizer]
    server = optax.chain(server, optax.scale_by_learning_rate(rate))
    if config.aggregation.method in aggregation_checks.WHOLE:
        server = aggregation.groups({"layers": optax.sgd(rate), "head": server})
    return client, server
