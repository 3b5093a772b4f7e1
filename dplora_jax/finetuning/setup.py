"""From a RunConfig to everything that a run needs; every mistake of a user's stops here, before any training."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax import lora, models
from dplora_jax.data import encoding
from dplora_jax.errors import InputError, InputWarning
from dplora_jax.federation import (
    calibration,
    description,
    fingerprints,
    finite,
    mesh,
    processes,
    program,
    round,
    streaming,
    trust_modes,
)
from dplora_jax.finetuning import dealing, frozen_layers, objectives, public_tests
from dplora_jax.models import features, pretrained
from dplora_jax.privacy import secrets
from experiments import tensorboard


class Prepared(NamedTuple):
    """A run, ready: what `run.train` works with."""

    model: Any
    params: Any
    lora_config: lora.LoraConfig
    federation: round.Rounds
    mesh: Any
    placement: mesh.Placement
    stream: Any  # streaming.Stream, or None where the records lie on the devices
    mechanisms: list
    state: round.State
    evaluate: Callable
    probe: Callable | None  # in its place for `finite.check`, where it evaluates nothing
    facts: dict  # what config.json says under "federation"
    inputs: dict  # {"base", "data"}: digests of the base model and of all records, to be keyed before they are shown
    records: dict  # {client: digest of its records}, of this process's own clients


def prepare(config, stored=None, memo=None, dealt=None):
    """Read, check, calibrate and place everything -> Prepared. `stored` is the config.json of a run that was charged already,
    whose mechanisms are kept; `memo`, a dict, carries what the frozen layers made of a table to the next call; `dealt` stands in
    for the records that the flags name. Raises InputError."""
    processes.at("reading the base model and the records")
    if config.output.tensorboard:
        tensorboard.check()
    dealt = dealt or dealing.deal(config)
    corpus = dealt.corpus
    labels = corpus.label_names if objectives.kind(config, corpus.task) == objectives.CLASSIFIER else None
    model, params = models.from_pretrained(config.base.name, config.base.dtype, None, config.base.quantize, labels)
    if config.base.remat:
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=True))
    grid = mesh.make(config.execution.mesh, config.schedule.clients, model)
    tokenizer = models.load_tokenizer(config.base.name)
    encoding.check_length(config.data.max_length, model, tokenizer)
    encoding.check_ids(model, tokenizer)
    finite.check_weights(config.base.name, params)
    aim = objectives.make(config, corpus.task, tokenizer)
    test = aim.test(corpus.test) if (config.execution.eval_every or config.base.feature_norm) and corpus.test else None
    params = frozen_layers.with_features(config, model, params, test, memo, stored)
    adapter, params, lora_config = program.adapter(config, model, params)
    wave, everyone = program.wave(config, grid, model, adapter), range(config.schedule.clients)
    table, shares = dealt.read(
        mesh.own_clients(grid, config.schedule.clients, wave)
    )  # no other client's text is looked at
    train = aim.train(table)
    sizes = _sizes(shares, config.schedule.clients)
    test = test if config.execution.eval_every else None
    _warn_of_delta(config, max(sizes))
    mechanisms = calibration.kept(stored, sizes) if stored else calibration.mechanisms(config, sizes)
    digest_of = {
        k: fingerprints.of_arrays({name: array[share] for name, array in train.items()}) for k, share in shares.items()
    }
    streamed = processes.agree(lambda: streaming.wanted(config, grid, train, sizes))
    inputs = {"base": fingerprints.of_base(model, params)}
    local, params = params, mesh.put(params, mesh.base_sharding(grid, params))
    # Records of one process alone go through its own copy of the base: what lies on all processes' mesh only all can run.
    model, train, test = frozen_layers.run_frozen_layers(
        config, model, params if processes.count() == 1 else local, memo, sum(sizes), train, test
    )
    del local
    none = np.zeros(0, int)
    shards = [{name: array[shares.get(k, none)] for name, array in train.items()} for k in everyone]
    shares = trust_modes.mode(config).shares(config, sizes, mechanisms)
    placement = mesh.place(grid, shards, shares, config.privacy.clip_norm, wave, config.lora.ranks, sizes, streamed)
    federation = program.federation(config, model, aim.loss, mechanisms, adapter, placement, wave, streamed)
    stream = None
    if streamed:
        stream = streaming.Stream(federation.local, mesh.fetch(placement.clients), shards, grid)
    state = mesh.put(federation.init(adapter, config.schedule.clients), NamedSharding(grid, PartitionSpec()))
    evaluate, probe = lambda state, ends=False: {}, None
    if config.execution.eval_every:
        private = dealing.by_client(table, shares)
        evaluate = public_tests.evaluator(config, aim, corpus, private, sizes, model, params, grid, tokenizer, test)
    else:
        whole, classifies = dataclasses.replace(model, start=0), aim.kind == objectives.CLASSIFIER
        probe = finite.sentence(config, classifies, whole, params, sizes, grid, tokenizer)
    told = description.of_run(config, corpus, sizes, mechanisms, model, adapter, grid, federation.local.noise)
    if labels is not None and (start := pretrained.head_start(config.base.name, labels)):
        told["method"].append(start)
    if features.KEY in params:
        told["features"] = {
            name: np.asarray(value).tolist() for name, value in mesh.fetch(params[features.KEY]).items()
        }
    if config.privacy.private and not all(math.isfinite(client["epsilon"]) for client in told["clients"]):
        raise InputError(
            f"no finite epsilon holds at delta={config.privacy.delta:g} with this noise: raise delta, or the noise."
        )
    made = model, params, lora_config, federation, grid, placement, stream, mechanisms, state
    return Prepared(*made, evaluate, probe, told, inputs, digest_of)


def _warn_of_delta(config, largest):
    """Warn where delta is no small matter to a client of `largest` records."""
    if config.privacy.private and config.privacy.delta * largest >= 1:
        warnings.warn(
            f"delta={config.privacy.delta:g} is not below 1 / {largest} records: at that delta, publishing one record whole would "
            "count as private.",
            InputWarning,
            stacklevel=1,
        )


def _sizes(shares, clients):
    """Every client's n_k, which are public, from the processes that hold their records."""
    known = {
        int(k): n for own in processes.gather({k: len(share) for k, share in shares.items()}) for k, n in own.items()
    }
    return [known[k] for k in range(clients)]


def with_records(prepared, secrets_of_clients):
    """The Prepared whose inputs speak of all clients' records, whoever holds them. Between processes go keyed digests alone: a
    plain one would tell the network who is in. Raises InputError where processes have different models or programs."""
    keyed = {
        k: secrets.digest(secrets_of_clients[k], "records", digest.hex()).hex()
        for k, digest in prepared.records.items()
    }
    own = {"base model": prepared.inputs["base"].hex(), "program": fingerprints.of_installation().hex()}
    gathered = processes.gather({"records": keyed, **own})
    for name in own:  # else one process would train another model, and nothing would say so
        for number, process in enumerate(gathered):
            if process[name] != gathered[0][name]:
                raise InputError(f"process {number} has another {name} than process 0: give all the same.")
    merged = {int(k): digest for process in gathered for k, digest in process["records"].items()}
    data = fingerprints.of_arrays([np.frombuffer(bytes.fromhex(merged[k]), np.uint8) for k in sorted(merged)])
    return prepared._replace(inputs=prepared.inputs | {"data": data})
