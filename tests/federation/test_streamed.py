"""Rounds whose rows the host drew and sent: the same rounds."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dplora_jax.federation import pool, round, streaming
from tests.conftest import mostly_slow
from tests.federation import small

pytestmark = pytest.mark.usefixtures("quick_compile")
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
ONE = small.Setup(local_steps=1)


def streamed(setup, rounds):
    """The state after `rounds`, and what each showed, with records on the host."""
    made, grid = small.federation(setup), small.grid_of(setup)
    made = dataclasses.replace(made, local=dataclasses.replace(made.local, batches=streaming.Streamed()))
    program = round.make(made, grid, transcript=True)
    state, params, clients, _, _ = small.arguments(setup, rounds)
    stream = streaming.Stream(made.local, jax.device_get(clients), small.records(), grid)
    shown = []
    for number in rounds:
        keys = stream.round(small.keys_of(setup, [number]))
        state, (public, _, _) = program(state, params, clients, {}, keys)
        shown.append(jax.tree.map(lambda x: np.array(x)[:, :5], public))
    return jax.tree.map(np.array, state), jax.tree.map(lambda *x: np.concatenate(x), *shown)


SETUPS = {
    "two local steps": small.Setup(),
    "pooled": ONE._replace(wave=5, pool=pool.rows(small.MECHANISMS)),
    "4x2, padding clients": small.Setup(rows=4, columns=2, wave=2),
}


@pytest.mark.parametrize("name", mostly_slow(["4x2, padding clients"], SETUPS))
def test_streamed_rounds_release_what_rounds_on_the_device_release(name):
    rounds, setup = range(1, 3), SETUPS[name]
    state, public, _ = small.run(setup._replace(diagnostics=False), rounds=rounds)
    jax.tree.map(close, streamed(setup, rounds), (state, public))
