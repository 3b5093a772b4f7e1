"""A federation that compiles in seconds: five unequal clients of random tokens, a BERT of two layers and four heads.

Every record carries `scale`, which multiplies its loss: 0 makes it the null record, a large one a record that is
surely clipped, and inf one whose gradient is not finite.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax import lora, losses
from dplora_jax.federation import aggregation, attendance, compression, mesh, methods, pool, ranks, robust, round
from dplora_jax.federation.client import APART, Client, LocalConfig, whole
from dplora_jax.federation.secure_sum import SecureSum
from dplora_jax.federation.trusted_server import TrustedServer
from dplora_jax.models import bert
from dplora_jax.privacy import accounting, clipping, secrets
from dplora_jax.privacy.adaptive import Adaptive
from dplora_jax.privacy.banded import Banded
from dplora_jax.privacy.banded_rounds import BandedRounds
from dplora_jax.privacy.noise import INDEPENDENT, NoNoise
from dplora_jax.privacy.unclipped import Unclipped

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
# Trust mode `distributed`: four surely send, of whom one colludes, and the other three's noise makes one of SIGMA.
SIGMA, HONEST = 1.3, 3
# Trust mode `client`: what a whole update is clipped to, the server's noise, and how often a client takes part.
UPDATE_CLIP, SERVER_STD, CLIENT_RATE = 0.05, 0.11, 0.6
RULES = {
    "local": aggregation.MEAN,
    "distributed": SecureSum(float(DIVISORS.sum()), survivors=4),
    "client": TrustedServer(CLIENT_RATE * 5, clip_norm=UPDATE_CLIP, noise_std=SERVER_STD),
}
# What a program is compiled with, whatever a module's own compilation is: see `compiled`.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
FULLY = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
SECRETS = secrets.from_seed(7, len(SIZES))
SERVER = secrets.from_seed(8, 1)


@functools.cache
def model_and_params():
    """A model whose sizes 2 and 4 divide, with weights large enough for uneven gradients."""
    config = bert.BertConfig(20, 16, 2, 4, 32, 8, 2, num_labels=3, pooling="mean")
    model = bert.Bert(config)
    return model, jax.tree.map(
        lambda p: 4 * np.asarray(p), jax.jit(model.init, compiler_options=QUICKLY)(jax.random.key(0))
    )


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
    trust: str = "local"

    clipping: str = "flat"
    bands: int = 1
    planned: int | None = None  # rounds, over which the noise is correlated
    method: str = "fedavg"
    robust: str | None = None
    partial: bool = False
    ranks: tuple | None = None
    upload_bits: int | None = None
    pool: int | None = None
    plain: bool = False  # the server takes the mean as it is: no momentum, no rate, no average


def grid_of(setup):
    """The mesh of a setup."""
    return mesh.make(f"{setup.rows}x{setup.columns}", len(SIZES), model_and_params()[0])


@functools.cache
def federation(setup):
    """The static part of a setup's program."""
    plain = setup.trust == "client"
    client = aggregation.groups({part: optax.sgd(rate) for part, rate in RATES.items()})
    server = optax.chain(optax.trace(MOMENTUM), optax.scale_by_learning_rate(SERVER_RATE))
    server, ema = (optax.sgd(1.0), 0.0) if setup.plain else (server, EMA)
    method = methods.BY_NAME[setup.method]
    rule = RULES[setup.trust]
    if setup.robust:
        rule = robust.RobustMean({"median": robust.median, "trimmed": robust.trimmed_mean(0.2)}[setup.robust])
    local = LocalConfig(
        setup.local_steps,
        max(SIZES),
        max(CAPACITIES),
        Unclipped() if plain else clipper(setup.clipping),
        NoNoise() if plain else own_noise(setup),
        upload=compression.Rounded(setup.upload_bits) if setup.upload_bits else compression.EXACT,
        cut=ranks.cut if setup.ranks else whole,
        microbatch=setup.microbatch,
    )
    return round.Rounds(
        model_and_params()[0],
        loss,
        local,
        client,
        server,
        ema,
        setup.wave,
        rule,
        method.ranked(method, 2) if setup.ranks else method,
        attendance.Some() if setup.partial else attendance.EVERYONE,
        pool.Pooled(setup.pool) if setup.pool else APART,
    )


def own_noise(setup):
    """What clients add themselves."""
    if setup.planned:
        return BandedRounds(setup.planned, setup.bands, MOMENTUM)
    return Banded(setup.local_steps, setup.bands) if setup.bands > 1 else INDEPENDENT


def clipper(name):
    """The clipper of this name, from CLIP on."""
    return Adaptive(CLIP) if name == "adaptive" else clipping.Clip(CLIP, name)


@functools.cache
def program(setup):
    """The dispatch of a setup, uncompiled."""
    return round.make(federation(setup), grid_of(setup), setup.transcript, setup.diagnostics)


@functools.cache
def compiled(setup, rounds):
    """The dispatch of a setup for a count of rounds; LLVM spends no time on any but the usual one."""
    options = FULLY if (setup, rounds) == (Setup(), len(ROUNDS)) else QUICKLY
    return program(setup).lower(*arguments(setup, range(rounds))).compile(compiler_options=options)


def keys_of(setup, rounds, attempt=0):
    """The keys of a setup's first dispatch, as its trust mode and its noise have them."""
    rate = {"local": 1.0 if setup.partial else None, "distributed": 1.0, "client": CLIENT_RATE}[setup.trust]
    holders = SECRETS + SERVER if setup.trust == "client" else SECRETS
    return federation(setup).local.noise.going_on(secrets.round_keys(holders, rounds, attempt, len(SECRETS), rate), [])


def mechanisms(trust):
    """What each client does itself."""
    if trust != "distributed":
        return MECHANISMS
    return [dataclasses.replace(m, noise_multiplier=SIGMA / math.sqrt(HONEST)) for m in MECHANISMS]


def arguments(setup, rounds, attempt=0, data=None, state=None, joins=None, **fields):
    """(state, params, clients, data, keys) of a dispatch; `fields` replace real clients' fields of `Client`, and `joins` [K] who
    takes part."""
    grid = grid_of(setup)
    place = mesh.place(grid, data or records(), mechanisms(setup.trust), CLIP, setup.wave, setup.ranks)
    clients = Client(*(np.array(value) for value in place.clients))
    for name, value in fields.items():
        getattr(clients, name)[: len(SIZES)] = value
    clients = jax.device_put(clients, NamedSharding(grid, PartitionSpec(aggregation.CLIENTS)))
    keys = keys_of(setup, rounds, attempt)
    if joins is not None:
        keys["joins"] = np.broadcast_to(np.array(joins, np.float32), keys["joins"].shape)
    keys = mesh.place_keys(grid, keys, len(clients.size))
    params = model_and_params()[1]
    params = jax.device_put(params, mesh.base_sharding(grid, params))
    state = federation(setup).init(jax.tree.map(jnp.array, adapter()), len(SIZES)) if state is None else state
    return jax.device_put(state, NamedSharding(grid, PartitionSpec())), params, clients, place.data, keys


def run(setup=None, rounds=ROUNDS, **options):
    """(state, transcript, diagnostics) of one dispatch, as numpy arrays, of the five real clients where it is of clients."""
    setup = setup or Setup()
    state, shown = compiled(setup, len(rounds))(*arguments(setup, rounds, **options))
    aggregate = jax.tree.map(np.array, shown[0].pop("aggregate")) if setup.trust != "local" else None
    public, private, _ = jax.tree.map(lambda x: np.array(x)[:, : len(SIZES)], shown)
    public |= {} if aggregate is None else {"aggregate": aggregate}
    return jax.tree.map(np.array, state), public, private


def run_made(made, setup, rounds, **options):
    """(state, transcript) of one dispatch of `made` (a `round.Rounds`) where `setup` has its clients, as `run` gives them."""
    program = round.make(made, grid_of(setup), transcript=True)
    state, (public, _, _) = program(*arguments(setup, rounds, **options))
    return jax.tree.map(np.array, state), jax.tree.map(lambda x: np.array(x)[:, : len(SIZES)], public)
