"""A whole federated round on one device beside its parts: what it takes over its clients' local steps, and what K clients take
over one client with K times the batch.

    python -m experiments.benchmark --measure=round --model=gpt2 --layers=2 --batch=8 --length=128 --clients=1,5
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax.config import RunConfig, replace
from dplora_jax.federation import aggregation, frozen_layers, mesh, pool, round, waves
from dplora_jax.federation.client import APART, LocalConfig
from dplora_jax.privacy import accounting, clipping, secrets
from experiments.benchmark import steps as benchmark_steps
from experiments.text.tables import Table

RECORDS = 10  # of a client, as a multiple of its expected batch


def federation(case, clients, records, expected, wave=1, pooled=False, microbatch=None, rate=0.1):
    """A round of `clients` clients of `records` random rows each, one local step of `expected` rows at `rate`, on one device ->
    (Rounds, mesh, (state, params, clients, data, keys))."""
    model, params, adapter, _ = benchmark_steps.arguments(case._replace(batch=1))
    rows = random_rows(case, model, clients * records)
    model, through = frozen(case, model, params, clients * records)
    rows = through(rows)
    grid = mesh.make("1x1", clients, model)
    params = jax.device_put(params, mesh.base_sharding(grid, params))
    shards = [{key: value[k * records : (k + 1) * records] for key, value in rows.items()} for k in range(clients)]
    mechanisms = _mechanisms(clients, records, expected)
    placed = mesh.place(grid, shards, mechanisms, 1.0, wave)
    local = LocalConfig(1, placed.records, placed.capacity, clipping.Clip(1.0), microbatch=microbatch)
    rows = pool.Pooled(pool.rows(mechanisms)) if pooled else APART
    optimizer = aggregation.groups({"layers": optax.sgd(rate), "head": optax.sgd(rate)})
    made = round.Rounds(model, benchmark_steps.loss_of(case), local, optimizer, optax.sgd(1.0), 0.9, wave, rows=rows)
    keys = secrets.round_keys(secrets.from_seed(0, clients), range(1, 2), 0)
    keys = mesh.place_keys(grid, keys, placed.clients.size.shape[0])
    state = jax.device_put(made.init(adapter), NamedSharding(grid, PartitionSpec()))
    return made, grid, (state, params, placed.clients, placed.data, keys)


def frozen(case, model, params, count):
    """`frozen_layers.split` of the case for `count` rows: (the model above the frozen layers, what takes rows through them)."""
    config = replace(RunConfig(), last_layers=case.last_layers)
    return frozen_layers.split(config, model, params, count, case.length)


def random_rows(case, model, count):
    """`count` rows {name: [count, ...]}, every token attended; the same at each call."""
    rng, shape = np.random.default_rng(0), (count, case.length)
    rows = {
        "input_ids": rng.integers(0, model.config.vocab_size, shape, np.int32),
        "attention_mask": np.ones(shape, np.int32),
    }
    if case.task == "classification":
        rows["labels"] = rng.integers(0, benchmark_steps.CLASSES, count, np.int32)
    return rows


def _mechanisms(clients, records, expected):
    return accounting.with_noise([records] * clients, expected, 1, 1.0, 1e-5)


def table(case, counts, repeats):
    """Lines: for each K, a round of K clients that expect `case.batch` rows each, their rows pooled and apart, over one client
    that expects K times the rows; and what the pooled round takes over its local steps (`waves.run`) alone. All take as many rows
    at a time, a client's capacity at most, and are interleaved. Ratios are medians, with quartiles."""
    body = []
    most = _mechanisms(1, RECORDS * case.batch, case.batch)[0].capacity
    for count in counts:
        pooled = federation(case, count, RECORDS * case.batch, case.batch, count, count > 1, most)
        apart = federation(case, count, RECORDS * case.batch, case.batch, 1, False, most)
        one = federation(case, 1, RECORDS * count * case.batch, count * case.batch, 1, False, most)
        calls = {"pooled": _round(*pooled), "apart": _round(*apart), "one": _round(*one), "steps": _steps(*pooled)}
        times = benchmark_steps.interleaved(calls, repeats)

        def spread(name, other, times=times):
            low, middle, high = np.quantile(times[name] / times[other], [0.25, 0.5, 0.75])
            return f"{middle:.3f} ({low:.3f} .. {high:.3f})"

        rows = ", ".join(str(_rows(*made)) for made in (pooled, apart, one))
        ratios = spread("pooled", "one"), spread("apart", "one"), spread("pooled", "steps")
        body.append([str(count), rows, f"{np.median(times['pooled']):.3f}", *ratios])
    head = ["K", "rows pooled, apart, of one", "round s", "/ one client", "apart / one", "/ local steps"]
    yield Table(head, body).text()


def _round(made, grid, arguments):
    """A function that runs one compiled round after the other."""
    state, rest = [jax.tree.map(jnp.copy, arguments[0])], arguments[1:]
    compiled = round.make(made, grid).lower(*arguments).compile()

    def run():
        state[0], _ = compiled(state[0], *rest)
        return state[0]

    return run


def _steps(made, grid, arguments):
    """A function that runs the local steps of that round alone: sampling, clipping, noise, and the clients' weighted sum."""
    state, params, clients, data, keys = arguments

    def local(state, params, clients, data, keys):
        members = waves.Members(clients, {name: value[0] for name, value in keys.items()})
        return waves.run(made, params, members, data, state, False, lambda *whole: whole)[:2]

    compiled = jax.jit(local).lower(state, params, clients, data, keys).compile()
    return lambda: compiled(state, params, clients, data, keys)


def _rows(made, grid, arguments):
    """How many rows a round's local steps compute, padding included."""
    return made.rows.padded_rows(made.local, len(arguments[2].size))
