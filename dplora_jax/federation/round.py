"""The compiled federation: rounds inside a scan, clients inside a round, one dispatch from start to end.

Letters: K clients, W clients at a time on one device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from dplora_jax.federation import aggregation
from dplora_jax.federation.aggregation import CLIENTS
from dplora_jax.federation.client import LocalConfig, update


class State(NamedTuple):
    """What one round hands to the next: the global adapter, the server optimizer's state, and the running average."""

    adapter: Any
    server: Any
    average: aggregation.Average


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

    def init(self, adapter):
        """The state before round 1."""
        return State(adapter, self.server_optimizer.init(adapter), aggregation.average_init(adapter))


class Shown(NamedTuple):
    """What a dispatch shows beside its state: nothing, but for tests (`transcript`) and diagnostics; [rounds, K, ...]."""

    uploads: Any
    trace: Any


def make(federation: Federation, mesh, transcript=False, diagnostics=False):
    """Compile-once function of a dispatch: (state, params, clients, data, keys) -> (state, Shown or None).

    `keys` {purpose: uint32 [rounds, K, 4, 2]} say how many rounds it runs. `state` is donated; `clients`, `data` and `keys` come
    from `mesh.place` and `mesh.place_keys`. Only with `transcript` does the program put out each client's uploads and
    noisy gradients, and only with `diagnostics` its exact loss, clip fraction and sampled count: otherwise they do not exist
    outside it.
    """

    def dispatch(state, params, clients, data, keys):
        def one_round(state, keys):
            total, shown = _all_clients(federation, params, clients, data, state.adapter, keys)
            mean = jax.lax.psum(total, CLIENTS)
            step, server = federation.server_optimizer.update(
                jax.tree.map(jnp.negative, mean), state.server, state.adapter
            )
            adapter = optax.apply_updates(state.adapter, step)
            average = aggregation.average_update(state.average, adapter, federation.ema)
            return State(adapter, server, average), _select(shown, transcript, diagnostics)

        return jax.lax.scan(one_round, state, keys)

    replicated, by_client, by_round = PartitionSpec(), PartitionSpec(CLIENTS), PartitionSpec(None, CLIENTS)
    mapped = jax.shard_map(
        dispatch,
        mesh=mesh,
        in_specs=(replicated, replicated, by_client, by_client, by_round),
        out_specs=(replicated, by_round),
        axis_names={CLIENTS},
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=0)


def _all_clients(federation, params, clients, data, adapter, keys):
    """The weighted sum of this device's uploads, wave after wave, and what each client shows [K, ...]."""
    loss = federation.loss(federation.model, params)

    def one(client, keys):
        return update(loss, federation.client_optimizer, federation.local, data, adapter, client, keys)

    def wave(total, members):
        group, group_keys = members
        uploads, trace = jax.vmap(one)(group, group_keys)
        return jax.tree.map(jnp.add, total, aggregation.weighted_sum(group.weight, uploads)), Shown(uploads, trace)

    waves = jax.tree.map(lambda x: x.reshape(-1, federation.wave, *x.shape[1:]), (clients, keys))
    total, shown = jax.lax.scan(wave, jax.tree.map(jnp.zeros_like, adapter), waves)
    return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), shown)


def _select(shown, transcript, diagnostics):
    """The parts of `shown` that the program may put out."""
    uploads, trace = shown
    private = (
        {"loss": trace.loss, "clip_fraction": trace.clip_fraction, "sampled": trace.sampled} if diagnostics else None
    )
    return {"uploads": uploads, "released": trace.released} if transcript else None, private
