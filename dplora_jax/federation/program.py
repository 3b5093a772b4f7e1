"""From a configuration to the program of a run: its adapter, its optimizers and the static part of the rounds.

A run and a plan of one make the same program here.
"""

import math

import jax
import optax

from dplora_jax import lora, per_row
from dplora_jax.errors import InputError
from dplora_jax.federation import (
    aggregation,
    attendance,
    compression,
    methods,
    participation,
    pool,
    ranks,
    robust,
    round,
    streaming,
    trust,
    units,
)
from dplora_jax.federation.client import APART, LocalConfig, whole
from dplora_jax.models import features
from dplora_jax.privacy import clippers, clipping, noises
from dplora_jax.privacy.noise import NoNoise
from dplora_jax.privacy.unclipped import Unclipped

MOST_POOLED, POOLED_BYTES = 8, 256 << 20  # clients of a wave, and bytes of their uploads, unless `wave` says otherwise
# Decay of the server's first and second moments, and what is added to the root (Reddi et al. 2021, section 5.1: tau 1e-3).
MOMENTS = (0.9, 0.99, 1e-3)


def lora_config(config):
    """The LoraConfig of a configuration."""
    return lora.LoraConfig(config.lora.rank, config.lora.alpha, config.lora.trained_targets, config.lora.last_layers)


def adapter(config, model, params):
    """(adapter, params, LoraConfig); the adapter's start is public, so a fixed key serves when there is no seed. With `core`,
    what is trained lies between an A and a B that public text gave (`features.BASES` of `params`)."""
    wanted = lora_config(config)
    try:
        fresh = lora.init(jax.random.key(config.privacy.seed or 0), model, params, wanted)
    except ValueError as error:
        raise InputError(str(error)) from None
    if config.lora.core:
        params, fresh = lora.between(params, fresh, _bases(params))
    elif config.lora.freeze_a:
        params, fresh = lora.freeze_a(params, fresh)
    return fresh, params, wanted


def _bases(params):
    """{target: (a, b)} that public text gave. Raises InputError."""
    measured = params.get(features.KEY, {}).get(features.BASES)
    if measured is None:
        raise InputError(
            "`core` needs an A and a B from public text (`models.public_bases`) in the base's params: see docs/core.md."
        )
    return {name: tuple(jax.numpy.asarray(base[letter]) for letter in "ab") for name, base in measured.items()}


def federation(config, model, loss, mechanisms, adapter, placement, length, wave=1, streamed=False):
    """The static part of the rounds (`round.Rounds`) for clients that lie as `placement` says, `wave` at a time."""
    trust_mode = trust.mode(config)
    own_noise = noise(config, mechanisms, placement.sizes, adapter)
    layout = units.layout(config)
    local = LocalConfig(
        config.schedule.local_steps,
        placement.records,
        placement.capacity,
        _clipper(config),
        own_noise,
        batches=streaming.Streamed() if streamed else layout.batches,
        upload=compression.Rounded(config.aggregation.upload_bits)
        if config.aggregation.upload_bits
        else compression.EXACT,
        cut=whole if config.lora.ranks is None else ranks.cut,
        microbatch=config.execution.microbatch,
    )
    return round.Rounds(
        model,
        layout.loss(loss),
        local,
        *optimizers(config),
        ema=config.aggregation.ema,
        wave=wave,
        rule=trust_mode.rule(config, mechanisms, placement.sizes, _robust(config.aggregation.robust)),
        method=_method(config),
        attendance=attendance.Some() if participation.partial(config) else attendance.EVERYONE,
        rows=_rows(config, mechanisms, model, adapter, wave, length),
    )


def noise(config, mechanisms, sizes, adapter):
    """What clients add of their own."""
    trust_mode = trust.mode(config)
    if not trust_mode.private or trust_mode.bare_clients:
        return NoNoise()
    sums = trust_mode.sums(trust_mode.shares(config, sizes, mechanisms))
    return noises.kind(config.privacy.noise).from_config(config, mechanisms, sums, adapter)


def _clipper(config):
    """What clients do to their rows' gradients."""
    if trust.mode(config).bare_clients or math.isinf(config.privacy.clip_norm):
        return Unclipped()
    return clippers.kind(config).make(config.privacy)


def _method(config):
    """The aggregation, of several ranks where clients have such."""
    method = methods.BY_NAME[config.aggregation.method]
    return method if config.lora.ranks is None else method.ranked(method, config.lora.rank)


def _robust(spec):
    """The robust mean that `robust` names, or None."""
    kind, _, share = spec.partition(":")
    return {"none": None, "median": robust.median, "trimmed_mean": robust.trimmed_mean(float(share or 0))}[kind]


def wave(config, grid, model, adapter, length):
    """How many clients a device computes at a time: as configured, else, where they can pool their rows, as many as it has, in
    waves of one size of up to MOST_POOLED clients whose uploads fit POOLED_BYTES."""
    if config.execution.wave is not None:
        return min(config.execution.wave, config.schedule.clients)
    if not _poolable(config, model, adapter, length):
        return 1
    each = -(-config.schedule.clients // grid.shape[aggregation.CLIENTS])
    most = max(1, min(MOST_POOLED, POOLED_BYTES // (4 * lora.count(adapter))))
    return -(-each // -(-each // most))


def _poolable(config, model, adapter, length):
    """Whether all clients' rows of a round go through one adapter, and are clipped to one norm (else the round refuses a pool),
    and rows' gradients, which pooled rows have, are the better way to every matrix's sum."""
    tokens = units.layout(config).tokens(length)
    kept = (
        per_row.keeps_less(tokens, *leaf.shape[1:], model.dtype) for leaf in jax.tree.leaves(adapter.get("layers", {}))
    )
    return not any(kept) and (
        config.schedule.local_steps == 1
        and _clipper(config).pools
        and noises.kind(config.privacy.noise).pools
        and config.lora.ranks is None
        and not _method(config).personal
        and not participation.partial(config)
    )


def _rows(config, mechanisms, model, adapter, wave, length):
    """Whether a wave's clients fill rows together, and then how many, the fullest wave's (`pool.Pooled`, else `client.Apart`)."""
    if wave == 1 or not _poolable(config, model, adapter, length):
        return APART
    waves = (mechanisms[first : first + wave] for first in range(0, len(mechanisms), wave))
    rows = max(map(pool.rows, waves))
    most = config.execution.microbatch or max(m.capacity for m in mechanisms)
    fits = 4 * pool.at_a_time(rows, most) * lora.count(adapter) <= clipping.ONE_PASS_BYTES
    return pool.Pooled(rows) if fits else APART


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
    if methods.BY_NAME[config.aggregation.method].settled:
        server = aggregation.groups({"layers": optax.sgd(rate), "head": server})
    return client, server
