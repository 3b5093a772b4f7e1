"""The compiled rounds: rounds inside a scan, clients inside a round, one dispatch from start to end.

Letters: K clients, L layers, I inputs, O outputs, R rank.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax.federation import aggregation, attendance, methods, waves
from dplora_jax.federation.aggregation import CLIENTS
from dplora_jax.federation.client import APART, LocalConfig


class State(NamedTuple):
    """What one round hands to the next: the global adapter, the server optimizer's state, the running average; each client's
    clip norm [K] where the clipper moves it, what of the adapter each keeps to itself [K, ...] (FedSA-LoRA: {target: B}), and the
    change {target: [L, I, O]} folded into the base where the method makes one; else (). All of it is public in mode `local`: a
    clip norm follows from counts that were released, and a client's own B from its noisy gradients."""

    adapter: Any
    server: Any
    average: aggregation.Average
    clip_norms: Any = ()
    own: Any = ()
    residual: Any = ()


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The static part of the program. `loss(model, params)` makes the local loss; `client_optimizer` and `server_optimizer`
    are optax transformations (the server's is fed the negative mean upload); `ema` is the average's decay; `wave` clients
    run at a time on each device. `rule` (`aggregation.Mean`) is the trust mode's, `method` (`methods.BY_NAME`) the aggregation's;
    `attendance` says whether some clients are missing from some rounds, and `rows` (`client.Apart`, `pool.Pooled`) whether the
    clients of a wave clip their rows together. Raises ValueError where these do not go together."""

    model: Any
    loss: Callable
    local: LocalConfig
    client_optimizer: optax.GradientTransformation
    server_optimizer: optax.GradientTransformation
    ema: float = 0.0
    wave: int = 1
    rule: Any = aggregation.MEAN
    method: Any = methods.BY_NAME["fedavg"]
    attendance: Any = attendance.EVERYONE
    rows: Any = APART

    def __post_init__(self):
        self.rule.check(self)
        self.rows.check(self)

    def init(self, adapter, clients=0):
        """The state before round 1; `clients` is K where each keeps something of its own (a clip norm, its B)."""
        own = jax.tree.map(lambda x: jnp.repeat(x[None], clients, 0), self.method.own(adapter))
        average = aggregation.average_init(adapter)
        server, clip_norms = self.server_optimizer.init(adapter), self.local.clipper.kept(clients)
        return State(adapter, server, average, clip_norms, own, self.method.residual(adapter))

    @property
    def keys(self):
        """The names of what a dispatch's keys hold."""
        return tuple(dict.fromkeys(["noise", *self.local.batches.keys, *self.rule.keys, *self.attendance.keys]))


def make(rounds: Rounds, mesh, transcript=False, diagnostics=False):
    """Compile-once function of a dispatch: (state, params, clients, data, keys) -> (state, (public, private, valid)).

    `keys` (`noise.Noise.round_keys`: those that `rounds.keys` names) say how many rounds it runs. `state` is donated; `clients`,
    `data` and `keys` come from `mesh.place` and `mesh.place_keys`. Only with `transcript` does the program put out each client's
    uploads and noisy gradients (and counts, under adaptive clipping), and only with `diagnostics` its exact loss, clip fraction
    and sampled count: otherwise they do not exist outside it. `valid` bool [rounds, K] says whose uploads counted: not those that
    stayed away or were not finite; None where uploads are not public. In modes `distributed` and `client` the transcript's
    "aggregate" [rounds, ...] is what the adversary sees; the uploads are private.
    """
    replicated, by_client, by_round = PartitionSpec(), PartitionSpec(CLIENTS), PartitionSpec(None, CLIENTS)
    states = State(replicated, replicated, replicated, by_client, by_client, replicated)
    key_specs = {name: replicated if name == "server" else by_round for name in rounds.keys}

    def dispatch(state, params, clients, data, keys):
        one = lambda state, keys: _round(rounds, params, clients, data, state, keys, transcript, diagnostics)  # noqa: E731
        return jax.lax.scan(one, state, keys)

    mapped = jax.shard_map(
        dispatch,
        mesh=mesh,
        in_specs=(states, replicated, by_client, by_client, key_specs),
        out_specs=(states, (by_round, replicated, by_round, by_round)),
        axis_names={CLIENTS},
        check_vma=False,
    )

    def program(state, params, clients, data, keys):
        # Only what real clients keep is kept, whole on every device, so that a run may go on on another mesh.
        kept, size = (state.clip_norms, state.own), len(clients.size)
        pad = lambda x: jnp.pad(x, [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)], constant_values=1)  # noqa: E731
        clip_norms, own = jax.tree.map(pad, kept)
        after, shown = mapped(state._replace(clip_norms=clip_norms, own=own), params, clients, data, keys)
        clip_norms, own = jax.tree.map(lambda x, new: new[: len(x)], kept, (after.clip_norms, after.own))
        after = after._replace(clip_norms=clip_norms, own=own)
        from_clients, from_server, private, valid = shown
        public = {**from_clients, **from_server} if transcript else None
        # The state lies as it came: else a compiler splits it over `model`, and the next dispatch, compiled already, refuses it.
        return jax.lax.with_sharding_constraint(after, NamedSharding(mesh, replicated)), (public, private, valid)

    return jax.jit(program, donate_argnums=0)


def _round(rounds, params, clients, data, state, keys, transcript, diagnostics):
    """One round -> (state, what it shows)."""
    keys, number = dict(keys), state.average.rounds
    server_keys = keys.pop("server", None)
    base = rounds.method.shift(rounds.model, params, state.residual)
    members = waves.Members(clients, keys, state.clip_norms, state.own)
    shows = transcript or rounds.rule.shows
    run = lambda split: waves.run(rounds, base, members, data, state, shows, split)  # noqa: E731
    terms, weight, shown = rounds.method.train(run, number)
    if jax.lax.axis_size(CLIENTS) > 1:  # XLA's partitioner of `model` refuses a sum over an axis of one
        terms, weight = jax.lax.psum((terms, weight), CLIENTS)
    new, settled = server_step(rounds, state, terms, weight, shown, server_keys)
    return new, _select(shown, settled.shown, transcript, diagnostics)


def server_step(rounds, state, terms, weight, shown, server_keys=None):
    """The server's half of a round, from the sums over all clients of their weighted terms and of their weights, and what the
    clients show (`waves.Shown`) -> (State, what the round came to)."""
    settled = rounds.rule.settle(rounds, terms, weight, state, shown, server_keys)
    up = jax.tree.map(jnp.negative, settled.mean)
    step, server = rounds.server_optimizer.update(up, state.server, state.adapter)
    adapter = optax.apply_updates(state.adapter, step)
    average = aggregation.average_update(state.average, adapter, rounds.ema)
    new = State(adapter, server, average, shown.clip_norm, shown.own, settled.residual)
    return rounds.rule.next(settled, new, state), settled


def _select(shown, from_server, transcript, diagnostics):
    """The parts of a round that the program may put out: (public of each client, of the server, private, whose uploads count)."""
    trace = shown.trace
    private = (
        {"loss": trace.loss, "clip_fraction": trace.clip_fraction, "sampled": trace.sampled} if diagnostics else None
    )
    public = {"uploads": shown.upload, "released": trace.released, **trace.count} if transcript else {}
    return public, from_server if transcript else {}, private, shown.valid
