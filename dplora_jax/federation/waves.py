"""All clients of one device in one round, `wave` at a time: memory follows the wave, not how many there are.

Letters: K clients of this device.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dplora_jax.federation.client import Trace


class Members(NamedTuple):
    """What each client of a wave comes with: its `Client`, its keys, and what it keeps from round to round of clip norm and
    adapter."""

    client: Any
    keys: dict
    clip_norm: Any = ()
    own: Any = ()


class Trained(NamedTuple):
    """What a client's local steps came to: the adapter that it `began` with, its change as it arrives at the server (`upload`),
    what the method sums (`terms`), its Trace, and what it keeps."""

    began: Any
    upload: Any
    terms: Any
    trace: Trace
    clip_norm: Any
    own: Any


class Shown(NamedTuple):
    """What each client shows [K, ...]: its upload and `Trace` (uploads, noisy gradients and counts are () unless asked for), what
    it keeps, and whether its upload counts (None where uploads are not public)."""

    upload: Any
    trace: Any
    clip_norm: Any
    own: Any
    valid: Any


def run(rounds, params, members, data, state, shows, split):
    """The sum over this device's clients of their weights times the terms of the aggregation, the sum of these weights, and the
    clients' `Shown` -> (terms, weight, Shown).

    `shows` asks for uploads and noisy gradients one by one, whose memory grows with K. `split(params, adapter)` moves into the
    base what is not trained in this round. Who counts, and with what weight, is the rule's.
    """

    @functools.partial(jax.jit, inline=True)  # traced once, for its shapes and for its steps
    def one(group):
        *sums, shown = _wave(rounds, params, group, data, state, split)
        if not shows:
            shown = shown._replace(upload=(), trace=shown.trace._replace(released=(), count={}))
        return *sums, shown

    members, back = rounds.attendance.arranged(members)
    waves = jax.tree.map(lambda x: x.reshape(-1, rounds.wave, *x.shape[1:]), members)
    terms, weight, _ = jax.eval_shape(one, jax.tree.map(lambda x: x[0], waves))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (terms, weight))

    def step(total, group):
        *sums, shown = rounds.attendance.run(one, group)
        return jax.tree.map(jnp.add, total, tuple(sums)), shown

    (terms, weight), shown = jax.lax.scan(step, zeros, waves)
    return terms, weight, back(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), shown))


def _wave(rounds, params, group, data, state, split):
    """(terms, weight, Shown) of one wave of clients, under `vmap`."""
    method, local, rule, rows = rounds.method, rounds.local, rounds.rule, rounds.rows
    params, start = split(params, state.adapter)
    loss = rounds.loss(rounds.model, params)
    prepared = rows.prepare(loss, local, data, start, group.client, group.keys)

    def one(member, prepared):
        client, keys = member.client, member.keys
        began = local.cut(method.begin(start, member.own), client)
        sums = rows.sums(prepared, loss, local, data, client, keys)
        change, trace, clip_norm = rule.train(rounds, sums, began, member)
        upload = local.upload(change, keys, local.local_steps)
        done = Trained(began, upload, (), trace, clip_norm, method.keep(member.own, change))
        return done._replace(upload=method.send(upload), terms=method.terms(client, start, done))

    return rule.total(rounds, group, jax.vmap(one)(group, prepared))
