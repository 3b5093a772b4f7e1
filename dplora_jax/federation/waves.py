"""All clients of one device in one round, `wave` at a time: memory follows the wave, not how many there are.

Letters: K clients of this device.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dplora_jax import lora
from dplora_jax.federation import aggregation, methods, pool
from dplora_jax.federation.client import sent, share, update
from dplora_jax.privacy import clipping


class Members(NamedTuple):
    """What each client of a wave comes with: its `Client`, its keys, and what it keeps from round to round (its clip norm under
    adaptive clipping, its own B where the method leaves it there; else ())."""

    client: Any
    keys: dict
    clip_norm: Any = ()
    own: Any = ()


class Shown(NamedTuple):
    """What each client shows [K, ...]: its upload and `Trace` (uploads, noisy gradients and counts are () unless asked for), what
    it keeps, and whether its upload counts."""

    upload: Any
    trace: Any
    clip_norm: Any
    own: Any
    valid: Any


def run(federation, params, members, data, state, shows, letter=None):
    """The sum over this device's clients of their weights times the terms of the aggregation, the sum of these weights, and the
    clients' `Shown` -> (terms, weight, Shown).

    `shows` asks for uploads and noisy gradients one by one, whose memory grows with K. `letter` is the half of every pair that is
    trained in this round, None for both. A client that does not take part ("joins" 0 in its keys), or whose upload is not
    finite, is in neither sum and keeps what it had. Modes `distributed` and `client` sum what they are given.
    """
    partial = "joins" in members.keys and federation.rule.trust in ("local", "none")

    def one(group):
        *sums, shown = _wave(federation, params, group, data, state, letter)
        if not shows:
            shown = shown._replace(upload=(), trace=shown.trace._replace(released=(), count=()))
        return *sums, shown

    size = federation.wave
    # Those who take part share waves, and the others' are idle.
    order = jnp.argsort(-members.keys["joins"]) if partial else None
    chosen = members if order is None else jax.tree.map(lambda x: x[order], members)
    waves = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), chosen)
    terms, weight, _ = jax.eval_shape(one, jax.tree.map(lambda x: x[0], waves))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (terms, weight))

    def step(total, group):
        if partial:
            *sums, shown = jax.lax.cond(
                (group.keys["joins"] > 0).any(), one, lambda group: _idle(jax.eval_shape(one, group), group), group
            )
        else:
            *sums, shown = one(group)
        return jax.tree.map(jnp.add, total, tuple(sums)), shown

    (terms, weight), shown = jax.lax.scan(step, zeros, waves)
    shown = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), shown)
    return terms, weight, shown if order is None else jax.tree.map(lambda x: x[jnp.argsort(order)], shown)


def _idle(shapes, group):
    """The outcome of a wave of which no client takes part: nothing, and everyone keeps what it has."""
    terms, weight, shown = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return terms, weight, shown._replace(clip_norm=group.clip_norm, own=group.own)


def _wave(federation, params, group, data, state, letter):
    """(terms, weight, Shown) of one wave of clients, under `vmap`."""
    method, local, rule = federation.method, federation.local, federation.rule
    start = state.adapter
    if letter is not None:  # the other half is a constant of the round, and no leaf of what is clipped and noised
        params, start = lora.freeze(params, start, {"a": "b", "b": "a"}[letter])
    loss = federation.loss(federation.model, params)
    sums = pool.sums(loss, local, data, start, group.client, group.keys) if local.pool else None

    def one(member, sums):
        begun = methods.with_own(start, member.own) if method.keeps_b else start
        begun = lora.truncate(begun, member.client.rank) if local.ranks else begun
        if rule.trust == "distributed":
            upload, trace = share(loss, local, data, begun, member.client, member.keys, sums)
            return upload, trace, member.clip_norm, upload
        optimizer = federation.client_optimizer
        made, trace, clip_norm = update(
            loss, optimizer, local, data, begun, member.client, member.keys, member.clip_norm, sums
        )
        upload = sent(local, made, member.keys)
        if method.keeps_b:  # what does not travel is not rounded
            upload = methods.with_own(upload, methods.own_of(made))
        return upload, trace, clip_norm, method.terms(member.client, begun, upload)

    uploads, trace, clip_norms, terms = jax.vmap(one)(group, sums)
    if rule.trust == "client":
        uploads = terms = clipping.clip_each(uploads, rule.clip_norm)
    if rule.trust not in ("local", "none"):
        weights = group.keys["joins"]  # who takes part counts in full, whatever its size
        shown = Shown(uploads, trace, clip_norms, group.own, weights > 0)
        return aggregation.weighted_sum(weights, terms), weights.sum(), shown
    return _valid(method, group, start, uploads, trace, clip_norms, terms)


def _valid(method, group, start, uploads, trace, clip_norms, terms):
    """The sums and `Shown` of a wave whose uploads the adversary sees one by one: those that are there and finite count."""
    there = group.keys.get("joins", jnp.ones_like(group.client.weight)) > 0
    valid = there & jax.vmap(aggregation.finite)(uploads) & (group.client.size > 0)
    if method.keeps_b:  # the global B is the mean of the clients' own, which follow their own steps
        own = jax.tree.map(jnp.add, group.own, methods.own_of(uploads))
        apart = jax.tree.map(jnp.subtract, own, methods.own_of(start))
        terms = methods.with_own(uploads, apart)
        uploads = {**uploads, "layers": {n: pair.replace(b=None) for n, pair in uploads["layers"].items()}}
    else:
        own = group.own
    clip_norms, own = aggregation.choose(valid, (clip_norms, own), (group.clip_norm, group.own))
    weights = group.client.weight * valid
    total = aggregation.weighted_sum(weights, aggregation.masked(valid, terms))
    # What never left its client is no upload, and its noisy gradients are no one's to see.
    uploads, released, count = aggregation.masked(there, (uploads, trace.released, trace.count))
    trace = trace._replace(released=released, count=count)
    return total, weights.sum(), Shown(uploads, trace, clip_norms, own, valid)
