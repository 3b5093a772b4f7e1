"""A federation whose parties share no machine: each runs a `Silo` on its own records, and a `Server` makes the next adapter.

    silo = Silo(model, params, losses.classification, config, client=2, records=rows, sizes=sizes, workdir="silo")
    server = Server(model, params, losses.classification, config, sizes)
    for number in range(1, config.schedule.rounds + 1):
        uploads = {client: silo.fit(server.adapter, number) for client, silo in silos.items()}
        server.aggregate(uploads)

No network is here: an adapter and an upload are pytrees of arrays. By the same seed the adapters are those of `Federation`, to the
rounding of floating point.

Letters: K clients.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dplora_jax import config_checks
from dplora_jax.config import replace
from dplora_jax.errors import InputError
from dplora_jax.federation import (
    calibration,
    description,
    dispatch,
    fingerprints,
    frozen_layers,
    mesh,
    program,
    round,
    storage,
    trust_modes,
)
from dplora_jax.federation.clock import Clock
from dplora_jax.privacy import secrets


class _Part(NamedTuple):
    """What a party's dispatches are of (`dispatch.Job.prepared`): its own mechanism, and the static part of its rounds."""

    mechanisms: list
    rounds: round.Rounds
    sizes: list
    state: round.State


def _settled(config, sizes):
    """`config`, checked, and what silos cannot do refused."""
    config = config_checks.settle(config)
    if len(sizes) != config.schedule.clients:
        raise InputError(f"there are {len(sizes)} sizes, and clients={config.schedule.clients}.")
    if config.privacy.trust == "client":
        raise InputError("trust=client trusts one server with everything: it is no way for silos; use trust=local.")
    if config.aggregation.method == "fedsa" or config.lora.ranks is not None:
        raise InputError("silos send whole adapters of one rank: aggregation=fedsa and `ranks` are for one program.")
    if config.schedule.participation != "all":
        raise InputError("who is in a round is the server's to ask for: leave out `participation`.")
    return config


class Silo:
    """One party's part alone: its records, its secret, its ledger. Nothing leaves it but what `fit` returns.

    `client` is its number among clients of the public `sizes`; `records` is a dict of [n_k, ...] arrays as `Federation.fit` takes
    them. Its noise is calibrated with all clients' sizes; a plan that carries `mechanisms` (one `accounting.Mechanism` a client)
    may give these instead. With a `workdir` its secret, its ledger and its clip norm are kept there; without, nothing is durable.
    It is a context manager, which gives the workdir free.

    Raises InputError for a configuration that silos cannot run, and for records of another size than `sizes` says.
    """

    def __init__(self, model, params, loss, config, *, client, records, sizes, mechanisms=None, workdir=None):
        self.config, self.client = _settled(config, sizes), client
        if len(records["attention_mask"]) != sizes[client]:
            raise InputError(
                f"client {client} has {len(records['attention_mask'])} records, and the plan is for {sizes[client]}."
            )
        self.mechanisms = mechanisms or calibration.mechanisms(self.config, list(sizes))
        config, length = self.config, records["attention_mask"].shape[1]
        adapter, params, _ = program.adapter(config, model, params)
        self._base = fingerprints.digest_base(model, params)
        self._records = fingerprints.digest_arrays(records)
        grid = mesh.make("1x1", 1, model)
        params = mesh.put(params, mesh.base_sharding(grid, params))
        model, through = frozen_layers.split(config, model, params, sizes[client], length)
        shares = trust_modes.mode(config).shares(config, sizes, self.mechanisms)
        placement = mesh.place(grid, [through(records)], [shares[client]], config.privacy.clip_norm, 1)
        rounds = program.federation(config, model, loss, self.mechanisms, adapter, placement, length)
        self._share, self._params, self._placement, self._grid = shares[client], params, placement, grid
        self._part = _Part([self.mechanisms[client]], rounds, [sizes[client]], rounds.init(adapter, 1))
        self._run = round.make(rounds, grid, transcript=True)
        self._opened = storage.open_silo(workdir, config)
        self._storage = self._opened.__enter__()
        self._job = self._begin()

    def _begin(self):
        """The Job of this party's rounds: its secret at hand, its ledger sealed, what was kept restored."""
        config, kept = self.config, self._storage
        seed = config.privacy.seed
        secret = kept.secrets(None, 1)[0] if seed is None else secrets.from_seed(seed, self.client + 1)[-1]
        kept.ledger.seal_with(secret)
        kept.ledger.promise()
        inputs = dispatch.keyed_inputs([secret], self._base, self._records)
        told = {"release": description.release(config), "communication": {}}
        kept.describe(config, told | {"client": self.client})
        job = dispatch.Job(config, self._part, kept, [secret], inputs, told, Clock(), {}, members=[self.client])
        dispatch.check_past(job)
        restored = kept.restore(self._part.state)
        self.done, self._state = restored[:2] if restored else (0, self._part.state)
        return job

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._opened.__exit__(*error)

    @property
    def epsilon(self):
        """What this party's records have paid, by its own ledger; 0 before the first round, None without privacy."""
        if not self.config.privacy.private:
            return None
        return max(self._storage.ledger.epsilons(self.config.privacy.delta), default=0.0)

    def fit(self, adapter, number):
        """Charge round `number` and run its local steps from the global `adapter` -> the upload, a pytree like it on the host.

        `number` is the next round, or the one that was run last, which is then a new attempt with new noise, paid for again. With
        trust=distributed the upload is a share that hides nothing alone: it must reach the server in a total only. Raises
        InputError for any other round, and where the epsilon of the records is spent.
        """
        if number not in (self.done, self.done + 1) or number < 1:
            raise InputError(f"round {number} does not follow round {self.done}, the last that this party ran.")
        job = self._job._replace(config=replace(self.config, dispatch_rounds=1, eval_every=0))
        charged = dispatch.charge(job, number - 1)
        if charged is None:
            raise InputError(f"round {number} was not planned, or the epsilon of this party's records is spent.")
        rounds, attempt = charged
        keys = self._keys(job, rounds, attempt)
        state = self._state._replace(adapter=adapter)
        state = state._replace(average=state.average._replace(rounds=jnp.int32(number - 1)))
        state = jax.tree.map(jnp.array, state)  # it is donated
        after, (public, _, valid) = self._run(state, self._params, self._placement.clients, self._placement.data, keys)
        upload = jax.tree.map(lambda x: np.asarray(x)[0, 0], public["uploads"])
        self._state, self.done = self._state._replace(clip_norms=after.clip_norms), number
        self._storage.save_silo(number, self._state, {"ledger": job.ledger.anchor})
        job.ledger.commit(rounds, attempt)
        return upload
