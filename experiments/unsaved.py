"""A run without a workdir: nothing is saved, charged or released. For sweeps and attacks, whose outputs are figures alone."""

import jax
import jax.numpy as jnp

from dplora_jax.federation import mesh, round
from dplora_jax.privacy import host_noise, secrets
from experiments import participants, trust_modes


def keys_of(config, prepared, held, rounds):
    """What rounds [a, b) draw from, by the secrets `held`, on the mesh."""
    local = prepared.federation.local
    if local.bits is None:
        keys = secrets.round_keys(held, range(*rounds), 0, config.clients, trust_modes.joining(config))
    else:
        stds = [m.noise_multiplier * 2.0**local.bits for m in prepared.mechanisms]
        adapter = prepared.state.adapter
        keys = host_noise.round_draws(held, range(*rounds), 0, local.local_steps, adapter, stds, local.records)
    if participants.partial(config):
        keys["joins"] = participants.joins(config, held, range(*rounds), 0)
    return mesh.place_keys(prepared.mesh, keys, prepared.placement.clients.size.shape[0])


def train(config, prepared, held, program=None):
    """The `round.State` after all rounds of `prepared` (`setup.Prepared`), in dispatches of `--dispatch_rounds`.

    `held` are the clients' secrets; `program` is one that `round.make` made of the like of `prepared`, to save compiling.
    """
    program = program or round.make(prepared.federation, prepared.mesh)
    place = prepared.placement
    state = jax.tree.map(jnp.copy, prepared.state)  # it is donated, and shares the head with the base
    for first in range(1, config.rounds + 1, config.dispatch_rounds):
        end = min(first + config.dispatch_rounds, config.rounds + 1)
        keys = keys_of(config, prepared, held, (first, end))
        state, _ = program(state, prepared.params, place.clients, place.data, keys)
    return state
