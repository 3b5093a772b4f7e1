"""A whole federated round on one device beside its parts: what it takes over its clients' local steps, and what K clients take
over one client with K times the batch.

    python -m experiments.benchmark --measure=round --model=gpt2 --layers=2 --batch=8 --length=128 --clients=1,5
"""

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax.federation import aggregation, mesh, round
from dplora_jax.federation.client import LocalConfig
from dplora_jax.privacy import accounting, secrets
from experiments import benchmark_steps

RECORDS = 10  # of a client, as a multiple of its expected batch


def federation(case, clients, records, expected, wave=1):
    """A round of `clients` clients of `records` random rows each, one local step of `expected` rows, on one device ->
    (Federation, mesh, (state, params, clients, data, keys))."""
    model, params, adapter, _ = benchmark_steps.arguments(case._replace(batch=1))
    grid = mesh.make("1x1", clients, model)
    params = jax.device_put(params, mesh.base_sharding(grid, params))
    rng, shape = np.random.default_rng(0), (clients * records, case.length)
    rows = {
        "input_ids": rng.integers(0, model.config.vocab_size, shape, np.int32),
        "attention_mask": np.ones(shape, np.int32),
    }
    if case.task == "classification":
        rows["labels"] = rng.integers(0, benchmark_steps.CLASSES, shape[0], np.int32)
    shards = [{key: value[k * records : (k + 1) * records] for key, value in rows.items()} for k in range(clients)]
    mechanisms = accounting.with_noise([records] * clients, expected, 1, 1.0, 1e-5)
    placed = mesh.place(grid, shards, mechanisms, 1.0, wave)
    local = LocalConfig(1, 1.0, placed.records, placed.capacity)
    optimizer = aggregation.groups({"layers": optax.sgd(0.1), "head": optax.sgd(0.1)})
    made = round.Federation(model, benchmark_steps.loss_of(case), local, optimizer, optax.sgd(1.0), 0.9, wave)
    keys = secrets.round_keys(secrets.from_seed(0, clients), range(1, 2), 0)
    keys = mesh.place_keys(grid, keys, placed.clients.size.shape[0])
    state = jax.device_put(made.init(adapter), NamedSharding(grid, PartitionSpec()))
    return made, grid, (state, params, placed.clients, placed.data, keys)


def table(case, counts, repeats):
    """Lines: for each K, a round of K clients that expect `case.batch` rows each, beside K local steps of as many rows as theirs
    hold (interleaved), and beside a round of one client that expects K times the rows."""
    yield f"{'K':>5} {'rows':>6} {'round s':>9} {'/ local steps':>14} {'rows of one':>12} {'/ one client':>13} {'rows / one':>11}"
    for count in counts:
        many = _round(case, count, case.batch)
        one = _round(case, 1, count * case.batch)
        held = many["rows"] // count
        model, params, adapter, batch = benchmark_steps.arguments(case._replace(batch=held))
        step = benchmark_steps.compiled(
            benchmark_steps.functions(case, model, ["auto"])["auto"], params, adapter, batch, donate=()
        )

        def steps(step=step, params=params, adapter=adapter, batch=batch, count=count):
            for _ in range(count):
                jax.block_until_ready(step.run(params, adapter, batch))

        times = benchmark_steps.interleaved({"round": many["run"], "steps": steps, "one": one["run"]}, repeats)
        ratio = {name: np.quantile(times["round"] / times[name], [0.25, 0.5, 0.75]) for name in ("steps", "one")}
        spread = {name: f"{mid:.3f} ({low:.3f} .. {high:.3f})" for name, (low, mid, high) in ratio.items()}
        yield (
            f"{count:5} {many['rows']:6} {np.median(times['round']):9.3f} {spread['steps']:>14} {one['rows']:12} "
            f"{spread['one']:>13} {many['rows'] / one['rows']:11.3f}"
        )


def _round(case, clients, expected):
    """{"run": a function that runs a round, "rows": how many rows its clients' batches hold}."""
    made, grid, arguments = federation(case, clients, RECORDS * expected, expected)
    compiled = round.make(made, grid).lower(*arguments).compile()
    state, rest = [arguments[0]], arguments[1:]

    def run():
        state[0], _ = compiled(state[0], *rest)
        return state[0]

    return {"run": run, "rows": made.local.capacity * clients}
