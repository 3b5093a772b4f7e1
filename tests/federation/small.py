"""A federation that compiles in seconds: five unequal clients of random tokens, a BERT of two layers and four heads.

Every record carries `scale`, which multiplies its loss: 0 makes it the null record, a large one a record that is
surely clipped, and inf one whose gradient is not finite.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax import lora, losses
from dplora_jax.federation import aggregation, mesh, round
from dplora_jax.federation.client import Client, LocalConfig
from dplora_jax.models import bert
from dplora_jax.privacy import accounting, secrets

SIZES, CAPACITIES, NOISES = (13, 4, 20, 9, 16), (8, 4, 9, 5, 7), (0.5, 0.8, 1.1, 1.4, 1.7)
EXPECTED, CLIP = 5, 0.7
RATES = {"layers": 0.3, "head": 1.0}
SERVER_RATE, MOMENTUM, EMA = 0.8, 0.6, 0.7
MECHANISMS = [
    accounting.Mechanism(n, accounting.sampling_rate(n, EXPECTED), c, s)
    for n, c, s in zip(SIZES, CAPACITIES, NOISES, strict=True)
]
DIVISORS = np.array([m.sampling_rate * m.records for m in MECHANISMS])
ROUNDS = range(1, 4)
SECRETS = secrets.from_seed(7, len(SIZES))


@functools.cache
def model_and_params():
    """A model whose sizes 2 and 4 divide, with weights large enough for uneven gradients."""
    config = bert.BertConfig(20, 16, 2, 4, 32, 8, 2, num_labels=3, pooling="mean")
    model = bert.Bert(config)
    return model, jax.tree.map(lambda p: 4 * np.asarray(p), jax.jit(model.init)(jax.random.key(0)))


@functools.cache
def adapter():
    """A rank-2 adapter on q and v whose B is not zero, so that A has a gradient too."""
    model, params = model_and_params()
    fresh = lora.init(jax.random.key(1), model, params, lora.LoraConfig(2, 4.0))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: np.asarray(x) + 0.2 * rng.standard_normal(x.shape, np.float32), fresh)


def records():
    """Each client's records: a list of {input_ids, attention_mask, labels, scale}."""
    rng = np.random.default_rng(3)
    return [
        {
            "input_ids": rng.integers(0, 20, (n, 6)).astype(np.int32),
            "attention_mask": (np.arange(6) < rng.integers(2, 7, (n, 1))).astype(np.int32),
            "labels": rng.integers(0, 3, n).astype(np.int32),
            "scale": rng.uniform(0.2, 2, n).astype(np.float32),
        }
        for n in SIZES
    ]


def loss(model, params):
    """Cross-entropy times the record's own scale, in the form that the fast clipping takes."""
    of_logits = lambda logits, batch: batch["scale"] * losses.classification_of_logits(logits, batch)  # noqa: E731
    return losses.ModelLoss(model, params, of_logits)


class Setup(NamedTuple):
    """What `program` is static in."""

    rows: int = 1
    columns: int = 1
    wave: int = 1
    microbatch: int | None = None
    local_steps: int = 2
    transcript: bool = True
    diagnostics: bool = True
    clipping: str = "flat"
    bands: int = 1


def grid_of(setup):
    """The mesh of a setup."""
    return mesh.make(f"{setup.rows}x{setup.columns}", len(SIZES), model_and_params()[0])


@functools.cache
def federation(setup):
    """The static part of a setup's program."""
    variant = {"microbatch": setup.microbatch, "clipping": setup.clipping, "bands": setup.bands}
    local = LocalConfig(setup.local_steps, CLIP, max(SIZES), max(CAPACITIES), **variant)
    client = aggregation.groups({part: optax.sgd(rate) for part, rate in RATES.items()})
    server = optax.chain(optax.trace(MOMENTUM), optax.scale_by_learning_rate(SERVER_RATE))
    return round.Federation(model_and_params()[0], loss, local, client, server, EMA, setup.wave)


@functools.cache
def program(setup):
    """The dispatch of a setup, uncompiled."""
    return round.make(federation(setup), grid_of(setup), setup.transcript, setup.diagnostics)


@functools.cache
def compiled(setup, rounds):
    """The dispatch of a setup for a count of rounds; LLVM spends no time on any but the usual one."""
    quick = None if setup == Setup() else {"xla_backend_optimization_level": 0}
    return program(setup).lower(*arguments(setup, range(rounds))).compile(compiler_options=quick)


def arguments(setup, rounds, attempt=0, data=None, state=None, **fields):
    """(state, params, clients, data, keys) of a dispatch; `fields` replace real clients' fields of `Client`."""
    grid = grid_of(setup)
    place = mesh.place(grid, data or records(), MECHANISMS, CLIP, setup.wave)
    clients = Client(*(np.array(value) for value in place.clients))
    for name, value in fields.items():
        getattr(clients, name)[: len(SIZES)] = value
    clients = jax.device_put(clients, NamedSharding(grid, PartitionSpec(aggregation.CLIENTS)))
    keys = mesh.place_keys(grid, secrets.round_keys(SECRETS, rounds, attempt), len(clients.size))
    params = model_and_params()[1]
    params = jax.device_put(params, mesh.base_sharding(grid, params))
    state = federation(setup).init(jax.tree.map(jnp.array, adapter()), len(SIZES)) if state is None else state
    return jax.device_put(state, NamedSharding(grid, PartitionSpec())), params, clients, place.data, keys


def run(setup=None, rounds=ROUNDS, **options):
    """(state, uploads and noisy gradients, diagnostics) of one dispatch, as numpy arrays of the five real clients."""
    setup = setup or Setup()
    state, shown = compiled(setup, len(rounds))(*arguments(setup, rounds, **options))
    public, private = jax.tree.map(lambda x: np.array(x)[:, : len(SIZES)], shown)
    return jax.tree.map(np.array, state), public, private
