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
from dplora_jax.federation.client import LocalConfig, share, update


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
    a time on each device; `rule` is the trust mode's. In mode `distributed` the client's transformation runs at the server,
    on the mean gradient, and has no memory (SGD)."""

    model: Any
    loss: Callable
    local: LocalConfig
    client_optimizer: optax.GradientTransformation
    server_optimizer: optax.GradientTransformation
    ema: float = 0.0
    wave: int = 1
    rule: aggregation.Rule = aggregation.LOCAL

    def init(self, adapter, clients=0):
        """The state before round 1; `clients` is K where each has a clip norm of its own (adaptive clipping)."""
        clip_norms = jnp.full(clients, self.local.clip_norm, jnp.float32) if self.local.adaptive else ()
        return State(adapter, self.server_optimizer.init(adapter), aggregation.average_init(adapter), clip_norms)


class Shown(NamedTuple):
    """What a dispatch shows beside its state: nothing, but for tests (`transcript`) and diagnostics; [rounds, K, ...]."""

    uploads: Any
    trace: Any


KEYS = {  # what a dispatch takes of `secrets.round_keys`
    "local": ("noise", "sampling"),
    "none": ("noise", "sampling"),
    "distributed": ("noise", "sampling", "joins"),
    "client": ("noise", "sampling", "joins", "server"),
}


def make(federation: Federation, mesh, transcript=False, diagnostics=False):
    """Compile-once function of a dispatch: (state, params, clients, data, keys) -> (state, Shown or None).

    `keys` (`secrets.round_keys`: those that KEYS names for the trust mode; or `host_noise.round_draws`) say how many rounds
    it runs. `state` is donated; `clients`, `data` and `keys` come from `mesh.place` and `mesh.place_keys`. Only with
    `transcript` does the program put out each client's uploads and noisy gradients (and counts, under adaptive clipping), and
    only with `diagnostics` its exact loss, clip fraction and sampled count: otherwise they do not exist outside it. In modes
    `distributed` and `client` the transcript's "aggregate" [rounds, ...] is what the adversary sees; the uploads are private.
    """

    def dispatch(state, params, clients, data, keys):
        def one_round(state, keys):
            server_keys = keys.get("server")
            keys = {name: value for name, value in keys.items() if name != "server"}
            total, clip_norms, shown = _all_clients(federation, params, clients, data, state, keys)
            total = jax.lax.psum(total, CLIENTS)
            mean, aggregate, sent = _mean_upload(federation, total, state.adapter, keys.get("joins"), server_keys)
            step, server = federation.server_optimizer.update(
                jax.tree.map(jnp.negative, mean), state.server, state.adapter
            )
            adapter = optax.apply_updates(state.adapter, step)
            average = aggregation.average_update(state.average, adapter, federation.ema)
            new = State(adapter, server, average, clip_norms)
            # A void round leaves no trace: neither momentum nor the average may move by what was not released.
            new = new if sent is None else aggregation.choose(sent, new, state)
            return new, _select(shown, aggregate, transcript, diagnostics)

        return jax.lax.scan(one_round, state, keys)

    replicated, by_client, by_round = PartitionSpec(), PartitionSpec(CLIENTS), PartitionSpec(None, CLIENTS)
    states = State(replicated, replicated, replicated, by_client)
    key_specs = {name: replicated if name == "server" else by_round for name in KEYS[federation.rule.trust]}
    public = {"uploads": by_round, "released": by_round}
    public |= {"aggregate": replicated} if "joins" in key_specs else {}
    public |= {"count": by_round} if federation.local.adaptive else {}
    mapped = jax.shard_map(
        dispatch,
        mesh=mesh,
        in_specs=(states, replicated, by_client, by_client, key_specs),
        out_specs=(states, (public if transcript else replicated, by_round)),
        axis_names={CLIENTS},
        check_vma=False,
    )

    def program(state, params, clients, data, keys):
        # Only real clients' clip norms are kept, whole on every device, so that a run may go on on another mesh.
        padding = lambda x: (0, len(clients.size) - len(x))  # noqa: E731
        wide = jax.tree.map(lambda x: jnp.pad(x, padding(x), constant_values=1), state.clip_norms)
        after, shown = mapped(state._replace(clip_norms=wide), params, clients, data, keys)
        after = after._replace(
            clip_norms=jax.tree.map(lambda x, new: new[: len(x)], state.clip_norms, after.clip_norms)
        )
        # The state lies as it came: else a compiler splits it over `model`, and the next dispatch, compiled already, refuses it.
        return jax.lax.with_sharding_constraint(after, NamedSharding(mesh, replicated)), shown

    return jax.jit(program, donate_argnums=0)


def _all_clients(federation, params, clients, data, state, keys):
    """The weighted sum of this device's uploads, wave after wave, the next clip norms, and what each client shows [K, ...]."""
    loss, rule = federation.loss(federation.model, params), federation.rule

    def one(client, keys, clip_norm):
        if rule.trust == "distributed":
            return *share(loss, federation.local, data, state.adapter, client, keys), clip_norm
        return update(loss, federation.client_optimizer, federation.local, data, state.adapter, client, keys, clip_norm)

    def wave(total, members):
        group, group_keys, _ = members
        uploads, trace, clip_norms = jax.vmap(one)(*members)
        uploads = aggregation.clip_each(uploads, rule.clip_norm) if rule.trust == "client" else uploads
        weights = group_keys.get("joins", group.weight)  # who takes part counts in full, whatever its size
        total = jax.tree.map(jnp.add, total, aggregation.weighted_sum(weights, uploads))
        return total, (clip_norms, Shown(uploads, trace))

    members = clients, keys, state.clip_norms
    waves = jax.tree.map(lambda x: x.reshape(-1, federation.wave, *x.shape[1:]), members)
    total, per_client = jax.lax.scan(wave, jax.tree.map(jnp.zeros_like, state.adapter), waves)
    return total, *jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), per_client)


def _mean_upload(federation, total, adapter, joins, server_keys):
    """The trust mode's mean upload from the total of all clients -> (mean, what the server releases or None where that is
    every upload, whether the round counts or None where it always does). A void round's total is never used."""
    rule = federation.rule
    if rule.trust == "distributed":
        sent = jax.lax.psum(joins.sum(), CLIENTS) >= rule.survivors
        gradient = jax.tree.map(lambda x: jnp.where(sent, x / rule.divisor, 0), total)
        optimizer = federation.client_optimizer
        return optimizer.update(gradient, optimizer.init(adapter), adapter)[0], gradient, sent
    if rule.trust == "client":
        mean = aggregation.noisy_mean(total, server_keys, rule)
        return mean, mean, None
    return total, None, None


def _select(shown, aggregate, transcript, diagnostics):
    """The parts of `shown` that the program may put out."""
    uploads, trace = shown
    private = (
        {"loss": trace.loss, "clip_fraction": trace.clip_fraction, "sampled": trace.sampled} if diagnostics else None
    )
    public = {"uploads": uploads, "released": trace.released}
    public |= {} if aggregate is None else {"aggregate": aggregate}
    public |= {"count": trace.count} if jax.tree.leaves(trace.count) else {}
    return public if transcript else None, private
