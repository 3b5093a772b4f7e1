"""From flags to the program of a run: its mechanisms, its adapter, its optimizers and the static part of the rounds.

A run and a plan of one make the same program here.
"""

import math

import jax
import optax

from dplora_jax import lora
from dplora_jax.errors import InputError
from dplora_jax.federation import aggregation, round
from dplora_jax.federation.client import LocalConfig
from dplora_jax.privacy import accounting, host_noise, integers
from experiments import ledger_checks, trust_modes


def mechanisms(config, sizes, stored):
    """Each client's sampling and noise: as an earlier start settled them, calibrated to the budget, or as flagged."""
    if stored is not None:
        began = [row["records"] for row in stored["federation"]["clients"]]
        if began != list(sizes):
            raise InputError(
                f"the clients have {sizes} records, and this workdir began with {began}: a budget is for the records that it was "
                "planned for; restore them, or start a new --workdir."
            )
        return ledger_checks.mechanisms(stored)
    if config.trust == "client":
        return trust_modes.of_clients(config)
    steps = config.rounds * config.local_steps
    options = config.mechanism_options
    if config.epsilon is not None:
        return accounting.calibrate(sizes, config.expected_batch_size, steps, config.epsilon, config.delta, **options)
    sigma = config.noise_multiplier or 0.0
    return accounting.with_noise(sizes, config.expected_batch_size, steps, sigma, config.delta, **options)


def adapter(config, model, params):
    """(adapter, params, LoraConfig); the adapter's start is public, so a fixed key serves when there is no seed."""
    lora_config = lora.LoraConfig(config.rank, config.alpha, config.target_list, config.last_layers)
    try:
        fresh = lora.init(jax.random.key(config.seed or 0), model, params, lora_config)
    except ValueError as error:
        raise InputError(str(error)) from None
    if config.freeze_a:
        params, fresh = lora.freeze_a(params, fresh)
    return fresh, params, lora_config


def federation(config, model, loss, mechanisms, adapter, placement):
    """The static part of the rounds (`round.Federation`) for clients that lie as `placement` says."""
    plain = config.trust == "client"  # there, clipping and noise are the server's
    local = LocalConfig(
        config.local_steps,
        math.inf if plain else config.clip_norm,
        placement.records,
        placement.capacity,
        microbatch=config.microbatch,
        private=config.private and not plain,
        clipping=config.clipping,
        quantile=config.clip_quantile,
        quantile_rate=config.clip_rate,
        bands=config.bands or 1,
        bits=bits(config, mechanisms, adapter),
    )
    client, server = optimizers(config)
    rule = trust_modes.rule(config, mechanisms, placement.sizes)
    return round.Federation(model, loss, local, client, server, config.ema, wave(config), rule)


def wave(config):
    """How many clients a device computes at a time."""
    return min(config.wave, config.clients)


def bits(config, mechanisms, adapter):
    """How fine the grid of hardened noise is; None for other noise."""
    if config.noise != "hardened":
        return None
    integers.check_size(adapter)
    worst = host_noise.excess_log2(
        config.rounds * config.local_steps * lora.count(adapter),
        max(accounting.epsilon(m, config.rounds * config.local_steps, config.delta) for m in mechanisms),
    )
    if worst > math.log2(config.delta / 100):
        raise InputError(
            f"--noise=hardened is exact to 2^{host_noise.DISTANCE_LOG2} a draw, which at this epsilon would add more than "
            f"a hundredth of --delta={config.delta:g}: raise delta, or the noise."
        )
    return integers.bits_for(mechanisms)


def optimizers(config):
    """(client's, server's) optax transformations: a learning rate for each part, momentum at the server.

    The clients' rates are constant within a round; their fall over the rounds, a factor on every upload, is the server's.
    """
    make = {"sgd": optax.sgd, "adam": optax.adam}[config.client_optimizer]
    client = aggregation.groups({"layers": make(config.client_lr), "head": make(config.head_lr)})
    rate = optax.linear_schedule(config.server_lr, config.server_lr * config.lr_decay, config.rounds)
    momentum = optax.trace(config.server_momentum) if config.server_momentum else optax.identity()
    return client, optax.chain(momentum, optax.scale_by_learning_rate(rate))
