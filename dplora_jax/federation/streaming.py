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

from dplora_jax.federation import client, mesh

SHARE = 0.25  # of a device's memory that records may take before they are streamed


def wanted(config, grid, table, sizes):
    """Whether to stream: as configured, else where a device's records would take more than SHARE of its memory, if it tells."""
    if config.execution.stream is not None:
        return config.execution.stream
    limit = (grid.local_devices[0].memory_stats() or {}).get("bytes_limit")
    row = sum(array.itemsize * math.prod(array.shape[1:]) for array in table.values())
    return limit is not None and row * sum(sizes) / len(grid.devices) > SHARE * limit


class Streamed:
    """In the place of `client.OnDevice`: batches that the host drew and sent."""

    keys = ("batch", "weights")

    def batch(self, local, data, client, keys, index):
        """The padded batch of local step `index` and its weights."""
        return jax.tree.map(lambda x: x[index], (keys["batch"], keys["weights"]))

    def first_rows(self, local, data, clients, keys):
        """The first step's rows of K clients together -> (dict of [N, ...], the rows that were drawn [K, C], weights [K, C])."""
        weights = keys["weights"][:, 0]
        rows = {name: array[:, 0].reshape(-1, *array.shape[3:]) for name, array in keys["batch"].items()}
        return rows, jnp.arange(weights.size), weights


class Stream:
    """The rows of clients' records `shards` (a list of dicts of [n_k, ...] arrays; empty where another process holds them) for
    rounds of `local` (a LocalConfig), sampled as `clients` says (`client.Client` of [K'], on the host)."""

    def __init__(self, local, clients, shards, grid):
        self.shards, self.grid, self.count = shards, grid, len(clients.size)
        steps = np.arange(local.local_steps)

        def draw(clients, keys):
            return jax.vmap(lambda one, keys: jax.vmap(lambda step: client.sample(local, one, keys, step))(steps))(
                clients, keys
            )

        try:
            self.host = jax.local_devices(backend="cpu")[0]
        except RuntimeError:  # JAX_PLATFORMS leaves it out
            self.host = jax.local_devices()[0]
        self.draw = jax.jit(draw)
        self.clients = clients

    def round(self, keys):
        """One round's keys [1, K, ...] as `mesh.place_keys` puts them, with "batch" {name: [1, K', S, C, ...]} and "weights"
        [1, K', S, C] in place of "sampling"."""
        padded = self.count - len(keys["sampling"][0])
        sampling_keys = np.pad(keys["sampling"][0], [(0, padded), *[(0, 0)] * (keys["sampling"].ndim - 2)])
        with jax.default_device(self.host):
            rows, weights = jax.device_get(self.draw(self.clients, {"sampling": sampling_keys}))
        batch = {
            name: np.zeros((self.count, *rows.shape[1:], *array.shape[1:]), array.dtype)
            for name, array in self.shards[0].items()
        }
        for k, shard in enumerate(self.shards):
            for name, array in shard.items():
                if len(array):
                    batch[name][k] = array[rows[k]]
        rest = {name: value for name, value in keys.items() if name != "sampling"}
        sent = {"batch": batch, "weights": weights}
        return mesh.place_keys(self.grid, rest | jax.tree.map(lambda x: x[None], sent), self.count)


def calls(prepared, keys, rounds):
    """What the compiled program of `prepared` (`setup.Prepared`) is called with for the `rounds` rounds of `keys`: (keys on the
    mesh, of how many rounds, seconds that they were waited for), all rounds at once, or one by one where records are streamed."""
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
