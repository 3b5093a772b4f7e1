"""From a RunConfig to everything that a run needs; every mistake of a user's stops here, before any training."""

import dataclasses
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax import evaluation, lora, losses, models
from dplora_jax.data import tasks
from dplora_jax.errors import InputError
from dplora_jax.federation import aggregation, mesh, round
from dplora_jax.federation.client import LocalConfig
from dplora_jax.privacy import accounting, host_noise, integers, paper_bound
from experiments import causes, ledger_checks, records, trust_modes

CHUNK = 128  # rows at a time through the frozen layers
CACHE_BYTES = 4 << 30  # of their outputs, at most


class Prepared(NamedTuple):
    """A run, ready: what `run.train` works with."""

    model: Any
    params: Any
    lora_config: lora.LoraConfig
    federation: round.Federation
    mesh: Any
    placement: mesh.Placement
    mechanisms: list
    state: round.State
    evaluate: Callable
    facts: dict  # what config.json says under "federation"
    causes: dict  # digests of all that decides the bits of a dispatch, to be keyed before they are shown


def prepare(config, stored=None):
    """Read, check, calibrate and place everything -> Prepared. `stored` is the config.json of an earlier start, whose
    mechanisms are kept. Raises InputError."""
    corpus, shares = records.load(config)
    sizes = [len(share) for share in shares]
    model, params = models.from_pretrained(config.model, config.dtype, len(corpus.label_names), config.quantize)
    if config.remat:
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=True))
    grid = mesh.make(config.mesh, config.clients, model)
    tokenizer = models.load_tokenizer(config.model)
    tasks.check_length(config.max_length, model, tokenizer)
    train = tasks.classification(tokenizer, corpus.train, config.max_length)
    test = tasks.classification(tokenizer, corpus.test, config.max_length) if corpus.test else None
    if config.private and config.delta * max(sizes) >= 1:
        warnings.warn(
            f"--delta={config.delta:g} is not below 1 / {max(sizes)} records: at that delta, publishing one record whole would "
            "count as private.",
            stacklevel=1,
        )
    mechanisms = trust_modes.settled(config, _mechanisms(config, sizes, stored))
    adapter, params, lora_config = _adapter(config, model, params)
    digests = causes.digests(config, (train, shares), model, params, mechanisms, grid)
    params = jax.device_put(params, mesh.base_sharding(grid, params))
    model, train, test = _run_frozen_layers(config, model, params, train, test)
    shards = [{name: array[share] for name, array in train.items()} for share in shares]
    wave = min(config.wave, config.clients)
    placement = mesh.place(grid, shards, trust_modes.own(config, sizes, mechanisms), config.clip_norm, wave)
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
        bits=_bits(config, mechanisms, adapter),
    )
    client_optimizer, server_optimizer = optimizers(config)
    federation = round.Federation(
        model,
        losses.classification,
        local,
        client_optimizer,
        server_optimizer,
        config.ema,
        wave,
        trust_modes.rule(config, mechanisms),
    )
    state = jax.device_put(federation.init(adapter, config.clients), NamedSharding(grid, PartitionSpec()))
    evaluate = evaluation.classifier(model, grid, params, test) if config.eval_every else lambda adapter: {}
    facts = _facts(config, corpus, sizes, mechanisms, model, adapter, grid)
    if config.private and not all(math.isfinite(client["epsilon"]) for client in facts["clients"]):
        raise InputError(
            f"no finite epsilon holds at --delta={config.delta:g} with this noise: raise delta, or the noise."
        )
    return Prepared(
        model,
        params,
        lora_config,
        federation,
        grid,
        placement,
        mechanisms,
        state,
        evaluate,
        facts,
        digests,
    )


def _bits(config, mechanisms, adapter):
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


def _mechanisms(config, sizes, stored):
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


def _adapter(config, model, params):
    """(adapter, params, LoraConfig); the adapter's start is public, so a fixed key serves when there is no seed."""
    lora_config = lora.LoraConfig(config.rank, config.alpha, config.target_list, config.last_layers)
    try:
        adapter = lora.init(jax.random.key(config.seed or 0), model, params, lora_config)
    except ValueError as error:
        raise InputError(str(error)) from None
    if config.freeze_a:
        params, adapter = lora.freeze_a(params, adapter)
    return adapter, params, lora_config


def _run_frozen_layers(config, model, params, *tables):
    """Run the layers below the adapted ones once for each record, if the flags allow -> (the model above them, *tables with
    `hidden` in place of `input_ids`). Here all records go through together; in a deployment each client runs its own."""
    depth = model.config.num_layers
    start = depth if config.head_only else depth - (config.last_layers or depth)
    if not start or not config.cache_frozen:
        return model, *tables
    rows = sum(len(table["labels"]) for table in tables if table is not None)
    if 4 * rows * config.max_length * model.config.width > CACHE_BYTES:
        print("warning: the frozen layers' outputs would not fit in memory; they run at each step.", file=sys.stderr)
        return model, *tables
    prefix = jax.jit(lambda params, batch: model.prefix(params, batch, start))

    def run(table):
        if table is None:
            return None
        inputs = {name: table[name] for name in ("input_ids", "attention_mask")}
        chunks = [np.asarray(prefix(params, chunk)) for chunk in evaluation.padded_batches(inputs, CHUNK)]
        hidden = np.concatenate(chunks)[: len(table["labels"])]
        return {"hidden": hidden, **{name: value for name, value in table.items() if name != "input_ids"}}

    return dataclasses.replace(model, start=start), *map(run, tables)


def optimizers(config):
    """(client's, server's) optax transformations: a learning rate for each part, momentum at the server.

    The clients' rates are constant within a round; their fall over the rounds, a factor on every upload, is the server's.
    """
    make = {"sgd": optax.sgd, "adam": optax.adam}[config.client_optimizer]
    client = aggregation.groups({"layers": make(config.client_lr), "head": make(config.head_lr)})
    rate = optax.linear_schedule(config.server_lr, config.server_lr * config.lr_decay, config.rounds)
    momentum = optax.trace(config.server_momentum) if config.server_momentum else optax.identity()
    return client, optax.chain(momentum, optax.scale_by_learning_rate(rate))


def _facts(config, corpus, sizes, mechanisms, model, adapter, grid):
    """What `config.json` and the report say beyond the flags; all of it public."""
    steps, total = config.rounds * config.steps_per_round, sum(sizes)
    sent, full = lora.count(adapter), lora.count(jax.eval_shape(model.init, jax.random.key(0)))
    spent = [accounting.epsilon(m, steps, config.delta) for m in mechanisms]
    clients = [
        {"client": k, **dataclasses.asdict(m), "records": n, "epsilon": e, "weight": w}
        for k, (m, n, e, w) in enumerate(zip(mechanisms, sizes, spent, trust_modes.weights(config, sizes), strict=True))
    ]
    method = [
        *trust_modes.method(config),
        "head alone, no LoRA"
        if config.head_only
        else f"LoRA rank {config.rank} on {config.targets}" + (", A frozen (FFA-LoRA)" if config.freeze_a else ""),
    ]
    if config.noise == "banded":
        method.append(
            f"noise correlated over {config.bands} local steps (banded matrix factorisation, Choquette-Choo et al. 2023), "
            f"each of them on its own {config.bands}th of a client's records"
        )
    if config.noise == "hardened":
        method.append(
            f"gradients cut to integers of clip_norm 2^-{integers.bits_for(mechanisms)}, and integer noise drawn on the "
            "host from SHAKE-256"
        )
    method += [f"average of released adapters, decay {config.ema:g}"] if config.ema else []
    bytes_sent, bytes_full = 4 * sent, 4 * full
    return {
        "clients": clients,
        "data": {
            "description": corpus.description,
            "synthetic": corpus.synthetic,
            "train_records": total,
            "test_records": len(corpus.test.texts) if corpus.test else 0,
            "labels": list(corpus.label_names),
        },
        "trust": list(trust_modes.statements(config)),
        "release": _release(config),
        "communication": {
            "adapter_parameters": sent,
            "full_parameters": full,
            "bytes_up_per_client_per_round": bytes_sent,
            "bytes_down_per_client_per_round": bytes_sent,
            "full_bytes_per_client_per_round": bytes_full,
            "ratio": full / sent,
        },
        "method": method,
        "environment": {
            "jax": jax.__version__,
            "devices": f"{grid.devices.size} x {grid.devices.flat[0].device_kind}",
            "mesh": "x".join(map(str, grid.devices.shape)),
        },
        "accounting": trust_modes.accounted_as(config)
        + (f" {paper_bound.sentence(mechanisms, steps, config.delta)}" if config.trust == "local" else ""),
    }


def _release(config):
    """Whether the outputs may leave the house; None where there is no privacy to speak of."""
    if not config.private:
        return None
    return "for release" if config.seed is None else "NOT FOR RELEASE: --seed makes the noise reproducible"
