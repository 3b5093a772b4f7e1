"""Records that stay on the host: each round's rows go to the devices while the round before runs.

A dispatch then runs round by round; its first rows are waited for, since its keys do not exist before it is paid for. The
host draws which records join, by the very function and keys of the compiled round, so that the batches are those that the
device would have picked; a device holds one round's rows and the next one's.

Letters: K clients, S local steps, C rows of the capacity.
"""

import concurrent.futures
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from dplora_jax.federation import client, mesh, units

SHARE = 0.25  # of a device's memory that records may take before they are streamed


def wanted(config, grid, table, rows):
    """Whether to stream the rows of all clients, at most `rows`: as configured, else where a device's part of them would take
    more than SHARE of its memory, if it tells; not where they have no public bound (None), for the choice would tell of it."""
    if config.execution.stream is not None or rows is None:
        return bool(config.execution.stream)
    limit = (grid.local_devices[0].memory_stats() or {}).get("bytes_limit")
    row = sum(array.itemsize * math.prod(array.shape[1:]) for array in table.values())
    return limit is not None and row * rows / len(grid.devices) > SHARE * limit


class Streamed(client.OnDevice):
    """In the place of `client.OnDevice`, or of `units.UnitsOnDevice`: batches that the host drew and sent."""

    keys = ("batch", "weights")

    def batch(self, local, data, client, keys, index):
        """The padded batch of local step `index` and its weights."""
        return jax.tree.map(lambda x: x[index], (keys["batch"], keys["weights"]))

    def first_picks(self, local, data, clients, keys):
        """The first step of K clients together -> (dict of what was sent [K C, ...], each one's places in it [K, C], weights
        [K, C])."""
        weights = keys["weights"][:, 0]
        rows = {name: array[:, 0].reshape(-1, *array.shape[3:]) for name, array in keys["batch"].items()}
        return rows, jnp.arange(weights.size).reshape(weights.shape), weights


class Stream:
    """The rows of clients' records `shards` (a list of dicts of [n_k, ...] arrays; empty where another process holds them) for
    rounds of `local` (a LocalConfig), sampled as `clients` says (`client.Client` of [K'], on the host), and picked as
    `layout.batches` would on the device; `rows` are the units' (`units.Rows`), where records are units."""

    def __init__(self, local, clients, shards, grid, layout=units.ROW_EACH, rows=None):
        self.shards, self.grid, self.count, self.source = shards, grid, len(clients.size), layout.batches
        looked_up, self.clients = layout.on_host(rows, clients)
        steps = np.arange(local.local_steps)

        def draw(client, keys):
            lookups = jax.tree.map(jnp.asarray, looked_up)
            return jax.vmap(lambda step: self.source.pick(local, lookups, client, keys, step))(steps)

        try:
            self.host = jax.local_devices(backend="cpu")[0]
        except RuntimeError:  # JAX_PLATFORMS leaves it out
            self.host = jax.local_devices()[0]
        self.draw = jax.jit(jax.vmap(draw))

    def round(self, keys):
        """One round's keys [1, K, ...] as `mesh.place_keys` puts them, with "batch" {name: [1, K', S, C, ...]} and "weights"
        [1, K', S, C] in place of those that `source` draws from."""
        drawn = jax.tree.map(lambda x: self._padded(x[0]), {name: keys[name] for name in self.source.keys})
        with jax.default_device(self.host):
            picked, weights = jax.device_get(self.draw(self.clients, drawn))
        gathered = {
            k: self.source.gather(shard, jax.tree.map(lambda x, k=k: x[k], picked))
            for k, shard in enumerate(self.shards)
            if len(next(iter(shard.values())))
        }
        nothing = {name: np.zeros_like(array) for name, array in next(iter(gathered.values())).items()}
        batches = [gathered.get(k, nothing) for k in range(self.count)]
        batch = {name: np.stack([one[name] for one in batches]) for name in nothing}
        rest = {name: value for name, value in keys.items() if name not in self.source.keys}
        sent = {"batch": batch, "weights": weights}
        return mesh.place_keys(self.grid, rest | jax.tree.map(lambda x: x[None], sent), self.count)

    def _padded(self, keys):
        """A round's keys [K, ...] with those of padding clients [K', ...], who never join."""
        return np.pad(keys, [(0, self.count - len(keys)), *[(0, 0)] * (keys.ndim - 1)])


def calls(prepared, keys, rounds):
    """What the compiled program of `prepared` (`preparation.Prepared`) is called with for the `rounds` rounds of `keys`: (keys on
    the mesh, of how many rounds, seconds that they were waited for), all rounds at once, or one by one where records are
    streamed."""
    if prepared.stream is None:
        yield mesh.place_keys(prepared.mesh, keys, prepared.placement.clients.size.shape[0]), rounds, 0.0
        return
    each = [jax.tree.map(lambda x, i=i: x[i : i + 1], keys) for i in range(rounds)]
    for placed, waited in ahead(prepared.stream.round, each):
        yield placed, 1, waited


def ahead(make, items):
    """(make(item), seconds that the caller waited for it) of each item, the next one being made meanwhile by another thread."""
    with concurrent.futures.ThreadPoolExecutor(1) as worker:
        pending = [worker.submit(make, item) for item in items[:1]]
        for following in [*items[1:], None]:
            start = time.perf_counter()
            value = pending.pop().result()
            waited = time.perf_counter() - start
            if following is not None:
                pending.append(worker.submit(make, following))
            yield value, waited
