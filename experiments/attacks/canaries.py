"""Canaries through the training program: what is audited, its transcript, and the bound that the transcript proves.

Canaries of each client are in or null by fair coins, rounds run by the same compiled step as `experiments.run`, and the adversary
guesses from the uploads.

Letters: K clients, C canaries of a client, N records, R rounds, D coordinates.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax import evaluation, lora, losses
from dplora_jax.config import field_value, replace
from dplora_jax.errors import InputError
from dplora_jax.federation import aggregation, mesh, round, trust, units
from dplora_jax.federation.client import LocalConfig
from dplora_jax.models import bert
from dplora_jax.privacy import accounting, auditing, clipping, secrets

FEWEST = 32  # coins: a quarter is the pilot's, and 23 right guesses beat a claim of 1
LOUD = 1e4  # a canary's gradient norm before clipping, in units of the clipping norm
CHUNK = 32  # records at a time through the gradient program
CANDIDATES = 32  # random records for each canary that is chosen
# What an audit reads a client's noisy sums from: its upload, of both halves, in every round, as it was made.
PLAIN = (
    ("aggregation", "fedavg"), ("robust", "none"), ("participation", "all"), ("ranks", None), ("upload_bits", None),
    ("proximal", 0.0), ("dropout", None), ("private_test", 0.0),
)  # fmt: skip
SMALL_RATE = 2.0  # the small model's learning rate: its adapter has to move for rounds to differ


class Subject(NamedTuple):
    """What is audited: the program's static part, where it lies, and the claim."""

    federation: round.Rounds
    grid: Any
    params: Any
    adapter: Any
    mechanisms: list
    rates: dict  # the clients' learning rate of each part of the adapter
    rounds: int
    delta: float
    vocabulary: int
    length: int
    layout: units.RowEach = units.ROW_EACH

    @property
    def steps(self):
        """Local steps in all."""
        return self.rounds * self.federation.local.local_steps

    @property
    def rate(self):
        """How likely a record joins a step, at the client where that is least."""
        return min(m.sampling_rate for m in self.mechanisms)


@dataclasses.dataclass(frozen=True, eq=False)
class Scaled(losses.ModelLoss):
    """A loss times the record's own `scale`: 0 makes it the null record, a large one a record that is surely clipped."""

    inner: Any = None

    def __call__(self, adapter, batch):
        return batch["scale"] * self.inner(adapter, batch)


@functools.cache
def scaled(loss):
    """The run's own `loss` ((model, params) -> ModelLoss) with records' scales."""

    def made(model, params):
        inner = loss(model, params)
        return Scaled(inner.model, inner.params, None, inner)

    return made


def small(epsilon, delta=1e-5, clients=1200, records=2, rate=1.0, rounds=4, layout=units.ROW_EACH):
    """A one-layer random BERT with rank-1 adapters, many clients of few records, that lie in rows as `layout` says -> Subject."""
    mechanism = accounting.calibrate([records], rate * records, rounds, epsilon, delta)[0]
    federation, grid, params, adapter = _small_program(clients, records, mechanism.capacity, layout)
    rates = {"layers": SMALL_RATE, "head": SMALL_RATE}
    return Subject(federation, grid, params, adapter, [mechanism] * clients, rates, rounds, delta, 20, 4, layout)


@functools.lru_cache(maxsize=4)
def _small_program(clients, records, capacity, layout):
    """(Rounds, mesh, params, adapter) of `small`: the same for every epsilon, so that it compiles once."""
    model = bert.Bert(bert.BertConfig(20, 8, 1, 2, 16, 8, 2, num_labels=3, pooling="mean"))
    params = jax.tree.map(lambda p: 4 * p, jax.jit(model.init)(jax.random.key(0)))
    adapter = lora.init(jax.random.key(1), model, params, lora.LoraConfig(1, 2.0))
    optimizer = aggregation.groups({part: optax.sgd(SMALL_RATE) for part in ("layers", "head")})
    local = LocalConfig(1, records, capacity, clipping.Clip(1.0), batches=layout.batches)
    loss = layout.loss(scaled(losses.classification))
    federation = round.Rounds(model, loss, local, optimizer, optax.sgd(1.0), wave=clients)
    return federation, mesh.make("1x1", clients, model), params, adapter


def from_config(config):
    """The program of a run's configuration, with each client's size, sampling and noise -> Subject. Raises InputError."""
    from dplora_jax.finetuning import setup

    if not trust.mode(config).private:
        raise InputError("there is no claim to audit in --trust=none: give --epsilon or --noise_multiplier.")
    for name, audited in (("trust", "local"), ("clipping", "flat"), ("noise", "independent"), *PLAIN):
        if field_value(config, name) != audited:
            raise InputError(f"--{name}={field_value(config, name)} cannot be audited yet, only {audited}.")
    if config.optimizer.client_optimizer != "sgd":
        raise InputError("--client_optimizer=adam cannot be audited: its uploads do not tell the noisy sums.")
    job = setup.prepare(replace(config, cache_frozen=False, stream=False, eval_every=0))
    prepared, layout = job.federation.prepare(job.shards), units.layout(config)
    return Subject(
        dataclasses.replace(prepared.rounds, loss=layout.loss(scaled(job.federation.loss))),
        prepared.mesh,
        prepared.params,
        prepared.state.adapter,
        prepared.mechanisms,
        {"layers": config.optimizer.client_lr, "head": config.optimizer.head_lr},
        config.schedule.rounds,
        config.privacy.delta,
        prepared.model.config.vocab_size,
        config.data.max_length,
        layout,
    )


def canary_records(subject, count, rng):
    """`count` records of random tokens (and labels, for a classifier) whose gradients are loud and point as far apart as greed
    finds -> {name: [C, ...]}."""
    pool, federation = count * CANDIDATES, subject.federation
    classes = losses.reader(federation.loss, federation.model, subject.params).config.num_labels
    records = {
        "input_ids": rng.integers(0, subject.vocabulary, (pool, subject.length)).astype(np.int32),
        "attention_mask": np.ones((pool, subject.length), np.int32),
        "scale": np.ones(pool, np.float32),
    }
    if classes is None:
        records["loss_mask"] = np.ones((pool, subject.length), np.int32)
    else:
        records["labels"] = rng.integers(0, classes, pool).astype(np.int32)
    leaves = jax.tree.leaves(gradients(subject, subject.adapter, records))
    flat = np.concatenate([leaf.reshape(pool, -1) for leaf in leaves], 1)
    norms = np.linalg.norm(flat, axis=1)
    unit = flat / norms[:, None]
    chosen = [int(np.argmax(norms))]
    for _ in range(count - 1):
        chosen.append(int(np.argmin(np.abs(unit @ unit[chosen].T).max(1))))
    picked = {name: value[chosen] for name, value in records.items()}
    picked["scale"] = (LOUD * subject.federation.local.clipper.clip_norm / norms[chosen]).astype(np.float32)
    return picked


@functools.lru_cache(maxsize=4)
def _gradient_program(federation):
    def one(params, adapter, record):
        loss = federation.loss(federation.model, params)
        return jax.grad(lambda a: loss(a, losses.as_batch_of_one(record))[0])(adapter)

    return jax.jit(jax.vmap(one, (None, None, 0)))


def gradients(subject, adapter, records):
    """Each record's own gradient, [C, ...] leaves; by plain autodiff, so that it does not depend on the code under audit."""
    whole = subject.layout.whole(records)
    program, chunks = _gradient_program(subject.federation), evaluation.padded_batches(whole, CHUNK)
    parts = [jax.device_get(program(subject.params, adapter, chunk)) for chunk in chunks]
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(records["scale"])], *parts)


def shards(subject, canaries, coins):
    """Each client's records, in rows: its canaries, silenced where the coin [K, C] says out, then, if all records join every
    step, one of opposed gradient for each (the most that clipping too late would hide), and null records.

    The opposed ones are known to be in and cost an adversary nothing where clipping is right. Raises InputError when a
    client is too small."""
    count = coins.shape[1]
    opposed = subject.rate == 1
    records_taken = count * (2 if opposed else 1)
    smallest = min(m.records for m in subject.mechanisms)
    if records_taken > smallest:
        raise InputError(
            f"--canaries={count} takes {records_taken} records, and a client has {smallest}: give a smaller number."
        )
    out = []
    for mechanism, mine in zip(subject.mechanisms, coins, strict=True):
        rows = np.resize(np.arange(count), mechanism.records)
        shard = {name: value[rows] for name, value in canaries.items()}
        scale = np.zeros(mechanism.records, np.float32)
        scale[:count] = canaries["scale"] * mine
        if opposed:
            scale[count:records_taken] = -canaries["scale"] / 2
        out.append(subject.layout.spread(shard | {"scale": scale}))
    return out


@functools.lru_cache(maxsize=4)
def _program(federation, grid):
    return round.make(federation, grid, transcript=True)


def transcript(subject, canaries, coins, keys, program=None):
    """Run the rounds -> (noisy sums {leaf: [R, K, D]}, canaries' clipped gradients {leaf: [R, C, D]}), both in
    units of the clipping norm, from the uploads and the public adapters alone. `keys` are the clients' secrets.

    Each round is a dispatch of its own, between which the public adapter is read: what a longer one does to keys is not seen."""
    local, count = subject.federation.local, len(subject.mechanisms)
    program = program or _program(subject.federation, subject.grid)
    rows, spans = subject.layout.arranged(shards(subject, canaries, coins))
    place = mesh.place(
        subject.grid,
        rows,
        subject.mechanisms,
        local.clipper.clip_norm,
        subject.federation.wave,
        sizes=[m.records for m in subject.mechanisms],
        rows=spans,
    )
    whole = NamedSharding(subject.grid, PartitionSpec())
    state = jax.device_put(subject.federation.init(jax.tree.map(jnp.array, subject.adapter)), whole)
    numbers = secrets.round_keys(keys, range(1, subject.rounds + 1), 0)
    if "rows" in subject.federation.keys:
        numbers["rows"] = secrets.keys_of(keys, "rows", range(1, subject.rounds + 1), 0)
    divisors = np.array([m.sampling_rate * m.records for m in subject.mechanisms])
    sums, seen = [], []
    for index in range(subject.rounds):
        seen.append(_clipped(gradients(subject, state.adapter, canaries), local.clipper.clip_norm))
        one = mesh.place_keys(
            subject.grid, {p: k[index : index + 1] for p, k in numbers.items()}, place.clients.size.shape[0]
        )
        state, (public, *_) = program(state, subject.params, place.clients, place.data, one)
        uploads = {
            part: jax.tree.map(lambda x: np.asarray(x)[0, :count], tree) for part, tree in public["uploads"].items()
        }
        sums.append(
            {
                name: -leaf.reshape(count, -1) * (divisors / local.clipper.clip_norm)[:, None] / rate
                for part, rate in subject.rates.items()
                if part in uploads and rate
                for name, leaf in _named({part: uploads[part]}).items()
            }
        )
    stack = lambda trees: {name: np.stack([tree[name] for tree in trees]) for name in trees[0]}  # noqa: E731
    sums = stack(sums)
    return sums, {name: leaf for name, leaf in stack(seen).items() if name in sums}


def _named(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _clipped(tree, clip_norm):
    """Gradients {leaf: [C, D]} cut to norm `clip_norm` and divided by it."""
    flat = {name: leaf.reshape(len(leaf), -1) for name, leaf in _named(tree).items()}
    norms = np.sqrt(sum((x.astype(np.float64) ** 2).sum(1) for x in flat.values()))
    return {name: x / np.maximum(norms, clip_norm)[:, None] for name, x in flat.items()}


def audit(subject, runs, canaries, rng, program=None, confidence=auditing.CONFIDENCE):
    """Attack `runs` trainings with `canaries` canaries a client -> (claimed epsilon, auditing.Bound at `confidence`)."""
    coins = runs * len(subject.mechanisms) * canaries
    if coins < FEWEST:
        raise InputError(
            f"{coins} coins (runs x clients x canaries) can prove nothing; {FEWEST} is the least: give more --runs or --canaries."
        )
    records = canary_records(subject, canaries, rng)
    score_tables, truth = [], []
    for _ in range(runs):
        coins = rng.integers(0, 2, (len(subject.mechanisms), canaries)).astype(bool)
        keys = [rng.bytes(32) for _ in subject.mechanisms]
        sums, directions = transcript(subject, records, coins, keys, program)
        sigmas = [m.noise_multiplier for m in subject.mechanisms]
        score_tables.append(
            auditing.scores(sums, directions, sigmas, subject.rate, subject.federation.local.local_steps)
        )
        truth.append(coins.reshape(-1))
    pooled = {name: np.concatenate([scores[name].reshape(-1) for scores in score_tables]) for name in score_tables[0]}
    same = subject.mechanisms[0] if len(set(subject.mechanisms)) == 1 else None
    claim = max(accounting.epsilon(m, subject.steps, subject.delta) for m in set(subject.mechanisms))
    truth, independent = np.concatenate(truth), canaries == 1
    reached = auditing.bound(pooled, truth, same, subject.steps, subject.delta, independent, confidence)
    return claim, reached
