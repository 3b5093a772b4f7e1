"""A federation whose parties share no machine: each runs a `Silo` on its own records, and a `Server` makes the next adapter.

    silo = Silo(model, params, losses.classification, config, client=2, records=rows, sizes=sizes, workdir="silo")
    server = Server(model, params, losses.classification, config, sizes)
    for number in range(1, config.schedule.rounds + 1):
        uploads = {client: silo.fit(server.adapter, number) for client, silo in silos.items()}
        server.aggregate(uploads)

No network is here: an adapter and an upload are pytrees of arrays. By the same seed the adapters are those of `Federation`, to
the rounding of floating point.

Letters: K clients.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dplora_jax import config_checks, lora
from dplora_jax.config import replace
from dplora_jax.errors import InputError
from dplora_jax.federation import (
    aggregation,
    attendance,
    calibration,
    client,
    description,
    dispatch,
    fingerprints,
    frozen_layers,
    mesh,
    program,
    round,
    silo_checks,
    storage,
    trust,
    units,
    waves,
)
from dplora_jax.federation.clock import Clock
from dplora_jax.privacy import secrets


class Part(NamedTuple):
    """What a party's dispatches are made of, as `dispatch.Job` has it of all: its mechanism, the static part of its rounds,
    and the state before round 1."""

    mechanisms: list
    shares: list
    rounds: round.Rounds
    state: round.State


def _settled(config, sizes):
    """`config`, checked, with what silos cannot do refused."""
    config = config_checks.settle(config)
    if len(sizes) != config.schedule.clients:
        raise InputError(
            f"{len(sizes)} sizes are given, and clients={config.schedule.clients}: give one for each client."
        )
    silo_checks.check(config)
    return config


def _mechanisms(config, sizes, planned):
    """Each client's Mechanism: as `planned`, or calibrated for clients of `sizes` records."""
    if planned is not None and [m.records for m in planned] != list(sizes):
        raise InputError("the plan's mechanisms are for clients of other sizes.")
    return planned or calibration.mechanisms(config, list(sizes))


def _init(rounds, adapter, clients=0):
    """The State before round 1; InputError where more than an adapter would have to travel."""
    state = rounds.init(adapter, clients)
    if jax.tree.leaves(state.residual):
        raise InputError(
            f"aggregation={rounds.method.name} changes the base in each round, and silos share an adapter alone: use fedavg, "
            "rolora or flexlora."
        )
    return state


class Spent(InputError):
    """A party's epsilon, or its planned rounds, are at their end."""


class Silo:
    """One party's part alone: its records, its secret, its ledger. Nothing leaves it but what `fit` returns.

    `client` is its number among clients of the public `sizes`; `records` is a dict of [n_k, ...] arrays as `Federation.fit`
    takes them. Its noise is calibrated with all clients' sizes; a plan that carries `mechanisms` (one
    `accounting.Mechanism` a client) may give them instead. With a `workdir` (a path) its secret, its ledger and its state
    are kept there; without, nothing is durable. A context manager: its end sets the workdir free. Silos of one
    configuration and of like shapes may share the compiled round: `programs`, a dict, keeps it. With the `description` of
    the whole federation (a dict, as config.json has it) the workdir is one that `experiments.ledger` and
    `experiments.report` read.

    Raises InputError for a configuration that silos cannot run, and for records of another number than `sizes` says.
    """

    def __init__(
        self,
        model,
        params,
        loss,
        config,
        *,
        client,
        records,
        sizes,
        mechanisms=None,
        workdir=None,
        programs=None,
        description=None,
    ):
        self.config, self.client = _settled(config, sizes), client
        if not 0 <= client < len(sizes):
            raise InputError(f"client={client} must lie between 0 and {len(sizes) - 1}.")
        layout = units.layout(self.config)
        (rows,), spans = layout.arranged([records])
        (held, length), count = rows["attention_mask"].shape, units.sizes([rows], spans)[0]
        if count != sizes[client]:
            raise InputError(f"client {client} has {count} records, and the plan is for {sizes[client]}.")
        mechanisms = _mechanisms(self.config, sizes, mechanisms)
        shares = trust.mode(self.config).shares(self.config, sizes, mechanisms)
        adapter, params, _ = program.adapter(self.config, model, params)
        digests = fingerprints.digest_base(model, params), fingerprints.digest_arrays(records)
        self._mesh = mesh.make("1x1", 1, model)
        self._params = mesh.put(params, mesh.base_sharding(self._mesh, params))
        most = layout.most_rows(count)
        model, through = frozen_layers.split(self.config, model, self._params, most, length, held=held)
        self._placement = mesh.place(
            self._mesh, [through(rows)], [shares[client]], self.config.privacy.clip_norm, 1, sizes=[count], rows=spans
        )
        everyone = self._placement._replace(sizes=list(sizes))
        rounds = program.federation(self.config, model, loss, mechanisms, adapter, everyone, length)
        part = Part([mechanisms[client]], [shares[client]], rounds, _init(rounds, adapter, 1))
        self._programs = {} if programs is None else programs
        seed = self.config.privacy.seed
        secret = None if seed is None else secrets.from_seed(seed, client + 1)[client]
        self._context = storage.open_silo(workdir, self.config, secret, description)
        try:
            self._job = self._begin(part, digests, self._context.__enter__(), secret)
        except BaseException:
            self._context.__exit__(None, None, None)
            raise

    def _begin(self, part, digests, kept, secret):
        """The Job of this party's rounds: its secret at hand, its ledger sealed, and what was kept restored."""
        secret = secret or kept.secrets(1, None)[0]
        kept.ledger.seal_with(secret)
        kept.ledger.promise()
        sent = lora.count(part.state.adapter)
        described = {"release": description.release(self.config), "communication": {"adapter_parameters": sent}}
        kept.describe(self.config, {"client": self.client})
        inputs = dispatch.keyed_inputs([secret], *digests)
        config = replace(self.config, dispatch_rounds=1, eval_every=0)
        job = dispatch.Job(config, part, kept, [secret], inputs, described, Clock(), {}, [self.client])
        dispatch.check_past(job)
        restored = kept.restore(part.state)
        self.done, self._state = restored[:2] if restored else (0, part.state)
        self._before = self._state  # the round that was run last
        return job

    @property
    def template(self):
        """A pytree like the adapter."""
        return self._state.adapter

    def settle(self, request):
        """After a restart: commit the round that was under way, where what it made was kept for this `request` (hex)."""
        entry = self._job.ledger.open_entry()
        if entry and entry.get("request") == request and entry["rounds"][1] - 1 == self.done:
            self._job.ledger.commit(entry["rounds"], entry["attempt"])

    def missed(self, number):
        """Rounds up to `number` went on without this party."""
        self.done, self._before = max(self.done, number), self._state

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._context.__exit__(*error)

    @property
    def epsilon(self):
        """What this party's records have paid by its own ledger, lost attempts included; infinite without privacy."""
        if not trust.mode(self.config).private:
            return float("inf")
        return max(self._job.ledger.epsilons(self.config.privacy.delta), default=0.0)

    def fit(self, adapter, number, *, request=None, send=None):
        """Charge round `number` and run its local steps from the global `adapter` -> the upload, a pytree like it on the host.

        `number` is the next round, or the last one again: then it is a new attempt with new noise, and paid for again. `request`
        (hex) joins the ledger's entry. `send(upload)` is called before the round is committed, to keep what is to be sent, and
        what it returns is returned: with trust=distributed the upload, int32, carries too little noise to leave this party
        but under masks, and so `send` is needed. Raises InputError for any other round, and Spent where this party's epsilon is
        spent.
        """
        if send is None and trust.mode(self.config).masked:
            raise InputError("an upload with trust=distributed has to be masked before it is sent: give `send`.")
        if self._job.storage.finished:
            raise InputError("this party has ended its part: its secret is gone.")
        if number < 1 or number not in (self.done, self.done + 1):
            raise InputError(f"round {number} does not follow round {self.done}, the last that this party ran.")
        charged = dispatch.charge(self._job, number - 1, **({} if request is None else {"request": request}))
        if charged is None:
            raise Spent(f"round {number} was not planned, or this party's epsilon is spent.")
        rounds, attempt = charged
        keys = dispatch.round_keys(self._job, rounds, attempt)
        keys["joins"] = np.ones((1, 1), np.float32)  # whoever is asked takes part
        keys = {name: keys[name] for name in self._job.prepared.rounds.keys}
        before = self._state if number > self.done else self._before
        begun = before._replace(adapter=adapter, average=before.average._replace(rounds=np.int32(number - 1)))
        placed = mesh.place_keys(self._mesh, keys, 1)
        begun = jax.tree.map(jnp.array, begun)  # it is donated
        arguments = begun, self._params, self._placement.clients, self._placement.data, placed
        after, shown = self._program(arguments)(*arguments)
        upload = jax.tree.map(lambda x: np.asarray(x)[0, 0], shown[0]["uploads"])
        self.done, self._before, self._state = number, before, before._replace(clip_norms=after.clip_norms)
        self._job.storage.save(number, self._state, {"ledger": self._job.ledger.anchor})
        sent = upload if send is None else send(upload)
        self._job.ledger.commit(rounds, attempt)
        return sent

    def _program(self, arguments):
        rounds = self._job.prepared.rounds
        return dispatch.compiled(self._programs, self.config, rounds, self._mesh, arguments, transcript=True)

    def finish(self):
        """End this party's part: its ledger says so, and its secret is destroyed. No round follows."""
        self._job.ledger.append(entry="end", round=self.done)
        self._job.storage.finish()


class Server:
    """The part that sums uploads and steps: it holds no record and no secret. `adapter` is the newest global one.

    Arguments as for `Silo`; all parties derive the same start from the public configuration.
    """

    def __init__(self, model, params, loss, config, sizes, mechanisms=None):
        self.config = _settled(config, sizes)
        mechanisms = _mechanisms(self.config, sizes, mechanisms)
        shares = trust.mode(self.config).shares(self.config, sizes, mechanisms)
        adapter, params, _ = program.adapter(self.config, model, params)
        grid = mesh.make("1x1", 1, model)
        nothing = [{} for _ in sizes]
        clip_norm = self.config.privacy.clip_norm
        placement = mesh.place(grid, nothing, shares, clip_norm, 1, sizes=list(sizes), streamed=True)
        self._clients = placement.clients
        rounds = program.federation(self.config, model, loss, mechanisms, adapter, placement, 1)
        self._rounds = dataclasses.replace(rounds, attendance=attendance.Some())
        self._state = _init(self._rounds, adapter)._replace(clip_norms=())  # each silo keeps its own
        self._step = jax.jit(self._aggregated)

    @property
    def adapter(self):
        """The adapter that the next round begins with, a pytree."""
        return self._state.adapter

    @property
    def released(self):
        """The adapter to release: the running average where `ema` asks for one."""
        return self._state.average.mean if self.config.aggregation.ema else self._state.adapter

    def aggregate(self, uploads):
        """The next global adapter from `uploads` {client: pytree like the adapter}; clients that sent nothing are left out.

        The sum is in the order of the clients, whatever the order of arrival. An upload with a number that is not finite counts
        as missing. A round without any upload leaves the adapter as it was.
        """
        template = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), self._state.adapter)
        each = [uploads.get(number, template) for number in range(self.config.schedule.clients)]
        joined = np.array([number in uploads for number in range(len(each))], np.float32)
        self._state = self._step(self._state, jax.tree.map(lambda *x: np.stack(x), *each), joined)
        return self.adapter

    def _aggregated(self, state, uploads, joined):
        """The state after a round of `uploads` [K, ...], of whom `joined` [K] is 1 where there is one."""
        rounds = self._rounds
        joined = joined * jax.vmap(aggregation.finite)(uploads)
        uploads = aggregation.masked(joined > 0, uploads)
        trace = client.Trace((), (), (), (), {})

        def one(member, upload):
            began = rounds.local.cut(rounds.method.begin(state.adapter, ()), member)
            done = waves.Trained(began, upload, (), trace, (), ())
            return done._replace(terms=rounds.method.terms(member, state.adapter, done))

        group = waves.Members(self._clients, {"joins": joined})
        terms, weight, shown = rounds.rule.total(rounds, group, jax.vmap(one)(self._clients, uploads))
        return round.server_step(rounds, state, terms, weight, shown)[0]
