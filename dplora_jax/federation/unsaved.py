"""A run without a workdir: nothing is saved, charged or released. For sweeps and attacks, whose outputs are figures alone."""

import jax
import jax.numpy as jnp

from dplora_jax.federation import randomness, round, streaming


def train(config, prepared, held, program=None):
    """The `round.State` after all rounds of `prepared` (`setup.Prepared`), in dispatches of `dispatch_rounds`.

    `held` are the clients' secrets; `program` is one that `round.make` made of the like of `prepared`, to save compiling.
    """
    program = program or round.make(prepared.federation, prepared.mesh)
    place = prepared.placement
    state = jax.tree.map(jnp.copy, prepared.state)  # it is donated, and shares the head with the base
    for first in range(1, config.schedule.rounds + 1, config.execution.dispatch_rounds):
        end = min(first + config.execution.dispatch_rounds, config.schedule.rounds + 1)
        keys = randomness.of_rounds(config, prepared, held, (first, end), 0)
        for placed, _, _ in streaming.calls(prepared, keys, end - first):
            state, _ = program(state, prepared.params, place.clients, place.data, placed)
    return state
