"""The compiled federation: rounds inside a scan, clients inside a round, one dispatch from start to end.

Letters: K clients, L layers, I inputs, O outputs, R rank.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax import lora
from dplora_jax.federation import aggregation, exact, methods, waves
from dplora_jax.federation.aggregation import CLIENTS
from dplora_jax.federation.client import LocalConfig
from dplora_jax.federation.methods import Method


class State(NamedTuple):
    """What one round hands to the next: the global adapter, the server optimizer's state, the running average; each client's
    clip norm [K] under adaptive clipping, each client's own B {target: [K, L, O, R]} where the method leaves it there, the change
    {target: [L, I, O]} folded into the base where the method makes one, else (). All of it is public in mode `local`: a clip norm
    follows from counts that were released, and a client's own B from its noisy gradients."""

    adapter: Any
    server: Any
    average: aggregation.Average
    clip_norms: Any = ()
    own: Any = ()
    residual: Any = ()


@dataclasses.dataclass(frozen=True)
class Federation:
    """The static part of the program. `loss(model, params)` makes the local loss; `client_optimizer` and `server_optimizer`
    are optax transformations (the server's is fed the negative mean upload); `ema` is the average's decay; `wave` clients
    run at a time on each device; `rule` is the trust mode's, `method` the aggregation's. `robust`, a function (uploads [K,
    ...], valid [K]) -> mean, takes the place of the weighted mean. `partial`: in modes `local` and `none` some clients are
    missing from some rounds. `streamed`: keys come with each round's "batch" and "weights" in the place of "sampling". In
    mode `distributed` the client's transformation runs at the server, on the mean gradient, and has no memory (SGD)."""

    model: Any
    loss: Callable
    local: LocalConfig
    client_optimizer: optax.GradientTransformation
    server_optimizer: optax.GradientTransformation
    ema: float = 0.0
    wave: int = 1
    rule: aggregation.Rule = aggregation.LOCAL
    method: Method = methods.FEDAVG
    robust: Callable | None = None
    partial: bool = False
    streamed: bool = False

    def __post_init__(self):
        if self.local.pool is not None and (
            self.method.keeps_b or self.partial or not math.isfinite(self.local.clip_norm)
        ):
            raise ValueError("rows are pooled where every client starts from one adapter, takes part, and clips.")

    def init(self, adapter, clients=0):
        """The state before round 1; `clients` is K where each keeps something of its own (a clip norm, its B)."""
        clip_norms = jnp.full(clients, self.local.clip_norm, jnp.float32) if self.local.adaptive else ()
        own = ()
        if self.method.keeps_b:
            own = jax.tree.map(lambda b: jnp.repeat(b[None], clients, 0), methods.own_of(adapter))
        residual = exact.zeros(adapter) if self.method.folds else ()
        average = aggregation.average_init(adapter)
        return State(adapter, self.server_optimizer.init(adapter), average, clip_norms, own, residual)


KEYS = {  # what a dispatch takes of `secrets.round_keys`
    "local": ("noise", "sampling"),
    "none": ("noise", "sampling"),
    "distributed": ("noise", "sampling", "joins"),
    "client": ("noise", "sampling", "joins", "server"),
}


def make(federation: Federation, mesh, transcript=False, diagnostics=False):
    """Compile-once function of a dispatch: (state, params, clients, data, keys) -> (state, (public, private, valid)).

    `keys` (`secrets.round_keys`: those that KEYS names for the trust mode, and "joins" where `federation.partial`; or
    `host_noise.round_draws`) say how many rounds it runs. `state` is donated; `clients`, `data` and `keys` come from
    `mesh.place` and `mesh.place_keys`. Only with `transcript` does the program put out each client's uploads and noisy gradients
    (and counts, under adaptive clipping), and only with `diagnostics` its exact loss, clip fraction and sampled count: otherwise
    they do not exist outside it. `valid` bool [rounds, K] says whose uploads counted: not those that stayed away or were not
    finite; None where uploads are not public. In modes `distributed` and `client` the transcript's "aggregate" [rounds, ...]
    is what the adversary sees; the uploads are private.
    """
    replicated, by_client, by_round = PartitionSpec(), PartitionSpec(CLIENTS), PartitionSpec(None, CLIENTS)
    states = State(replicated, replicated, replicated, by_client, by_client, replicated)
    names = dict.fromkeys([*KEYS[federation.rule.trust], *(["joins"] if federation.partial else [])])
    names = (
        {n: None for n in names if n != "sampling"} | {"batch": None, "weights": None} if federation.streamed else names
    )
    key_specs = {name: replicated if name == "server" else by_round for name in names}
    public = {"uploads": by_round, "released": by_round}
    public |= {"aggregate": replicated} if federation.rule.trust in ("distributed", "client") else {}
    public |= {"count": by_round} if federation.local.adaptive else {}

    def dispatch(state, params, clients, data, keys):
        one = lambda state, keys: _round(federation, params, clients, data, state, keys, transcript, diagnostics)  # noqa: E731
        return jax.lax.scan(one, state, keys)

    mapped = jax.shard_map(
        dispatch,
        mesh=mesh,
        in_specs=(states, replicated, by_client, by_client, key_specs),
        out_specs=(states, (public if transcript else replicated, by_round, by_round)),
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
        # The state lies as it came: else a compiler splits it over `model`, and the next dispatch, compiled already, refuses it.
        return jax.lax.with_sharding_constraint(after, NamedSharding(mesh, replicated)), shown

    return jax.jit(program, donate_argnums=0)


def _round(federation, params, clients, data, state, keys, transcript, diagnostics):
    """One round -> (state, what it shows)."""
    server_keys = keys.get("server")
    keys = {name: value for name, value in keys.items() if name != "server"}
    based = lora.shifted(federation.model, params, state.residual) if federation.method.folds else params
    members = waves.Members(clients, keys, state.clip_norms, state.own)
    shows = transcript or federation.robust is not None
    terms, weight, shown = _in_turn(federation, based, members, data, state, shows)
    if jax.lax.axis_size(CLIENTS) > 1:  # XLA's partitioner of `model` refuses a sum over an axis of one
        terms, weight = jax.lax.psum((terms, weight), CLIENTS)
    mean, residual, aggregate, sent = _settle(federation, terms, weight, state, shown, server_keys)
    step, server = federation.server_optimizer.update(jax.tree.map(jnp.negative, mean), state.server, state.adapter)
    adapter = optax.apply_updates(state.adapter, step)
    average = aggregation.average_update(state.average, adapter, federation.ema)
    new = State(adapter, server, average, shown.clip_norm, shown.own, residual)
    # A void round leaves no trace: neither momentum nor the average may move by what was not released.
    new = new if sent is None else aggregation.choose(sent, new, state)
    return new, _select(shown, aggregate, federation.rule.trust, transcript, diagnostics)


def _in_turn(federation, params, members, data, state, shows):
    """`waves.run`, of the half of every pair whose turn it is where the method trains them in turn; what is not trained is 0."""
    turns = federation.method.turns
    if not turns:
        return waves.run(federation, params, members, data, state, shows)
    whole = jax.eval_shape(lambda: waves.run(federation, params, members, data, state, shows))

    def half(letter):
        return lambda: methods.filled(waves.run(federation, params, members, data, state, shows, letter), whole)

    return jax.lax.switch(state.average.rounds % len(turns), [half(letter) for letter in turns])


def _settle(federation, terms, weight, state, shown, server_keys):
    """What the round comes to, from the sums over all clients -> (mean upload, next residual, what the server releases or None
    where that is every upload, whether the round counts or None where it always does)."""
    rule, optimizer, adapter = federation.rule, federation.client_optimizer, state.adapter
    if rule.trust == "distributed":
        sent = weight >= rule.survivors
        gradient = jax.tree.map(lambda x: jnp.where(sent, x / rule.divisor, 0), terms)
        return optimizer.update(gradient, optimizer.init(adapter), adapter)[0], state.residual, gradient, sent
    if rule.trust == "client":
        mean = aggregation.noisy_mean(terms, server_keys, rule)
        return mean, state.residual, mean, None
    sent = weight > 0
    mean = jax.tree.map(lambda x: x / jnp.where(sent, weight, 1), terms)
    if federation.robust is not None:
        gather = lambda x: jax.lax.all_gather(x, CLIENTS, tiled=True)  # noqa: E731
        mean = federation.robust(jax.tree.map(gather, shown.upload), gather(shown.valid))
    mean, residual = federation.method.settle(mean, adapter, state.residual, state.average.rounds)
    return mean, residual, None, sent


def _select(shown, aggregate, trust, transcript, diagnostics):
    """The parts of `shown` that the program may put out."""
    uploads, trace = shown.upload, shown.trace
    private = (
        {"loss": trace.loss, "clip_fraction": trace.clip_fraction, "sampled": trace.sampled} if diagnostics else None
    )
    public = {"uploads": uploads, "released": trace.released}
    public |= {} if aggregate is None else {"aggregate": aggregate}
    public |= {"count": trace.count} if jax.tree.leaves(trace.count) else {}
    return public if transcript else None, private, shown.valid if trust in ("local", "none") else None
