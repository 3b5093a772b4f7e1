"""The compiled federation: rounds inside a scan, clients inside a round, one dispatch from start to end.

Letters: K clients, W clients at a time on one device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax.federation import aggregation
from dplora_jax.federation.aggregation import CLIENTS
from dplora_jax.federation.client import LocalConfig, update


class State(NamedTuple):
    """What one round hands to the next: the global adapter, the server optimizer's state, the running average, and each client's
    clip norm [K] under adaptive clipping, else (). All of it is public in mode `local`: a clip norm follows from counts that were
    released."""

    adapter: Any
    server: Any
    average: aggregation.Average
    clip_norms: Any = ()


@dataclasses.dataclass(frozen=True)
class Federation:
    """The static part of the program. `loss(model, params)` makes the local loss; `client_optimizer` and `server_optimizer` are
    optax transformations (the server's is fed the negative mean upload); `ema` is the average's decay; `wave` clients run at
    a time on each device."""

    model: Any
    loss: Callable
    local: LocalConfig
    client_optimizer: optax.GradientTransformation
    server_optimizer: optax.GradientTransformation
    ema: float = 0.0
    wave: int = 1

    def init(self, adapter, clients=0):
        """The state before round 1; `clients` is K where each has a clip norm of its own (adaptive clipping)."""
        clip_norms = jnp.full(clients, self.local.clip_norm, jnp.float32) if self.local.adaptive else ()
        return State(adapter, self.server_optimizer.init(adapter), aggregation.average_init(adapter), clip_norms)


class Shown(NamedTuple):
    """What a dispatch shows beside its state: nothing, but for tests (`transcript`) and diagnostics; [rounds, K, ...]."""

    uploads: Any
    trace: Any


def make(federation: Federation, mesh, transcript=False, diagnostics=False):
    """Compile-once function of a dispatch: (state, params, clients, data, keys) -> (state, Shown or None).

    `keys` {purpose: uint32 [rounds, K, 4, 2]}, or the draws of hardened noise, say how many rounds it runs. `state` is donated;
    `clients`, `data` and `keys` come from `mesh.place` and `mesh.place_keys`. Only with `transcript` does the program put out
    each client's uploads and noisy gradients (and counts, under adaptive clipping), and only with `diagnostics` its exact loss,
    clip fraction and sampled count: otherwise they do not exist outside it.
    """

    def dispatch(state, params, clients, data, keys):
        def one_round(state, keys):
            total, clip_norms, shown = _all_clients(federation, params, clients, data, state, keys)
            mean = jax.lax.psum(total, CLIENTS)
            step, server = federation.server_optimizer.update(
                jax.tree.map(jnp.negative, mean), state.server, state.adapter
            )
            adapter = optax.apply_updates(state.adapter, step)
            average = aggregation.average_update(state.average, adapter, federation.ema)
            return State(adapter, server, average, clip_norms), _select(shown, transcript, diagnostics)

        return jax.lax.scan(one_round, state, keys)

    replicated, by_client, by_round = PartitionSpec(), PartitionSpec(CLIENTS), PartitionSpec(None, CLIENTS)
    states = State(replicated, replicated, replicated, by_client)
    mapped = jax.shard_map(
        dispatch,
        mesh=mesh,
        in_specs=(states, replicated, by_client, by_client, by_round),
        out_specs=(states, by_round),
        axis_names={CLIENTS},
        check_vma=False,
    )

    def program(state, params, clients, data, keys):
        # Only real clients' clip norms are kept, whole on every device, so that a run may go on on another mesh.
        padding = lambda x: (0, len(clients.size) - len(x))  # noqa: E731
        wide = jax.tree.map(lambda x: jnp.pad(x, padding(x), constant_values=1), state.clip_norms)
        after, shown = mapped(state._replace(clip_norms=wide), params, clients, data, keys)
        whole = NamedSharding(mesh, replicated)
        narrow = lambda x, new: jax.lax.with_sharding_constraint(new[: len(x)], whole)  # noqa: E731
        return after._replace(clip_norms=jax.tree.map(narrow, state.clip_norms, after.clip_norms)), shown

    return jax.jit(program, donate_argnums=0)


def _all_clients(federation, params, clients, data, state, keys):
    """The weighted sum of this device's uploads, wave after wave, the next clip norms, and what each client shows [K, ...]."""
    loss = federation.loss(federation.model, params)

    def one(client, keys, clip_norm):
        return update(loss, federation.client_optimizer, federation.local, data, state.adapter, client, keys, clip_norm)

    def wave(total, members):
        uploads, trace, clip_norms = jax.vmap(one)(*members)
        total = jax.tree.map(jnp.add, total, aggregation.weighted_sum(members[0].weight, uploads))
        return total, (clip_norms, Shown(uploads, trace))

    members = clients, keys, state.clip_norms
    waves = jax.tree.map(lambda x: x.reshape(-1, federation.wave, *x.shape[1:]), members)
    total, per_client = jax.lax.scan(wave, jax.tree.map(jnp.zeros_like, state.adapter), waves)
    return total, *jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), per_client)


def _select(shown, transcript, diagnostics):
    """The parts of `shown` that the program may put out."""
    uploads, trace = shown
    private = (
        {"loss": trace.loss, "clip_fraction": trace.clip_fraction, "sampled": trace.sampled} if diagnostics else None
    )
    public = {"uploads": uploads, "released": trace.released}
    if jax.tree.leaves(trace.count):
        public["count"] = trace.count
    return public if transcript else None, private
