"""From a RunConfig to everything that a run needs; every mistake of a user's stops here, before any training."""

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import pathlib
import platform
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import dplora_jax
import experiments
from dplora_jax import evaluation, lora, losses, models
from dplora_jax.data import partition, sources, tasks
from dplora_jax.errors import InputError
from dplora_jax.federation import aggregation, mesh, round
from dplora_jax.federation.client import LocalConfig
from dplora_jax.privacy import accounting, host_noise, integers, trust

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
    records: bytes  # a digest of the clients' records, and
    fingerprint: bytes  # one of everything that feeds the mechanism; both to be keyed before they are shown


def prepare(config, stored=None):
    """Read, check, calibrate and place everything -> Prepared. `stored` is the config.json of an earlier start, whose
    mechanisms are kept. Raises InputError."""
    corpus, shares = _records(config)
    sizes = [len(share) for share in shares]
    model, params = models.from_pretrained(config.model, config.dtype, len(corpus.label_names), config.quantize)
    if config.remat:
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=True))
    grid = mesh.make(config.mesh, config.clients, model)
    tokenizer = models.load_tokenizer(config.model)
    tasks.check_length(config.max_length, model, tokenizer)
    train = tasks.classification(tokenizer, corpus.train, config.max_length)
    test = tasks.classification(tokenizer, corpus.test, config.max_length) if corpus.test else None
    mechanisms = _mechanisms(config, sizes, stored)
    adapter, params, lora_config = _adapter(config, model, params)
    records = _digest_arrays((train, shares))
    fingerprint = _fingerprint(config, records, params, mechanisms, grid)
    params = jax.device_put(params, mesh.base_sharding(grid, params))
    model, train, test = _run_frozen_layers(config, model, params, train, test)
    shards = [{name: array[share] for name, array in train.items()} for share in shares]
    wave = min(config.wave, config.clients)
    placement = mesh.place(grid, shards, mechanisms, config.clip_norm, wave)
    local = LocalConfig(
        config.local_steps,
        config.clip_norm,
        placement.records,
        placement.capacity,
        microbatch=config.microbatch,
        private=config.private,
        clipping=config.clipping,
        quantile=config.clip_quantile,
        quantile_rate=config.clip_rate,
        bands=config.bands or 1,
        bits=_bits(config, mechanisms, adapter),
    )
    client_optimizer, server_optimizer = optimizers(config)
    federation = round.Federation(
        model, losses.classification, local, client_optimizer, server_optimizer, config.ema, wave
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
        records,
        fingerprint,
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


def _records(config):
    """The corpus, and each client's indices into its training records."""
    names = tuple(name.strip() for name in config.labels.split(",")) if config.labels else None
    corpus = sources.load(
        sources.Source(
            dataset=config.dataset, data_dir=config.data_dir, test_data=config.test_data, text_column=config.text_column,
            label_column=config.label_column, group_column=partition.group_column(config.partition), labels=names,
            test_fraction=config.test_fraction, split_seed=config.split_seed,
        ),
        need_test=config.eval_every > 0,
    )  # fmt: skip
    return corpus, partition.partition(
        config.partition, corpus.train.labels, corpus.train.groups, config.clients, config.split_seed
    )


def _mechanisms(config, sizes, stored):
    """Each client's sampling and noise: as an earlier start settled them, calibrated to the budget, or as flagged."""
    if stored is not None:
        rows = stored["federation"]["clients"]
        began = [row["records"] for row in rows]
        if began != list(sizes):
            raise InputError(
                f"the clients have {sizes} records, and this workdir began with {began}: a budget is for the records that it was "
                "planned for; restore them, or start a new --workdir."
            )
        names = [field.name for field in dataclasses.fields(accounting.Mechanism)]
        return [accounting.Mechanism(**{name: row[name] for name in names if name in row}) for row in rows]
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


def _digest_arrays(tree):
    """SHA-256 of the leaves' bytes."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.digest()


def _fingerprint(config, records, params, mechanisms, grid):
    """A digest of everything that feeds the mechanism: replaying rounds under the same keys is sound only if none of it moved."""
    digest = hashlib.sha256()
    free = ("workdir", "dispatch_rounds", "eval_every")  # they move no bit of a round
    facts = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy", "jax_privacy")]
    machine = (
        [device.device_kind for device in grid.devices.flat],
        jax.process_count(),
        platform.machine(),
        _processor(),
    )
    environment = os.environ.get("XLA_FLAGS", ""), str(jax.config.values)
    digest.update(repr((sorted(facts.items()), mechanisms, dict(grid.shape), versions, machine, environment)).encode())
    for package in (dplora_jax, experiments):
        for path in sorted(pathlib.Path(package.__file__).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    digest.update(records + _digest_arrays(params))
    return digest.digest()


def _processor():
    """The processor and how many of its cores are ours: another one may add in another order."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    return (
        platform.processor(),
        model,
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    )


def _facts(config, corpus, sizes, mechanisms, model, adapter, grid):
    """What `config.json` and the report say beyond the flags; all of it public."""
    steps, total = config.rounds * config.local_steps, sum(sizes)
    sent, full = lora.count(adapter), lora.count(jax.eval_shape(model.init, jax.random.key(0)))
    spent = [accounting.epsilon(m, steps, config.delta) for m in mechanisms]
    clients = [
        {"client": k, **dataclasses.asdict(m), "epsilon": e, "weight": m.records / total}
        for k, (m, e) in enumerate(zip(mechanisms, spent, strict=True))
    ]
    method = [
        f"DP-LoRA (arXiv 2312.17493), per-example clipping {_clipping(config)}"
        if config.private
        else "Federated LoRA, no noise",
        "FedAvg weighted by n_k / n",
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
        "trust": list(trust.STATEMENTS[config.trust]),
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
        "accounting": "Privacy loss distributions (dp_accounting) of Poisson sampling with a fixed capacity and the Gaussian "
        "mechanism; neighbours differ in one record, replaced by a null record.",
    }


def _clipping(config):
    """How gradients are clipped, in words."""
    return {
        "flat": f"at L2 norm {config.clip_norm:g}",
        "per_layer": f"of each adapted matrix and the head apart, at L2 norm {config.clip_norm:g} in all",
        "automatic": f"by normalising to L2 norm {config.clip_norm:g} (automatic clipping, Bu et al. 2023)",
        "adaptive": f"at a norm that follows a private estimate of the {config.clip_quantile:g} quantile of norms, from "
        f"{config.clip_norm:g} on (Andrew et al. 2021)",
    }[config.clipping]


def _release(config):
    """Whether the outputs may leave the house; None where there is no privacy to speak of."""
    if not config.private:
        return None
    return "for release" if config.seed is None else "NOT FOR RELEASE: --seed makes the noise reproducible"
