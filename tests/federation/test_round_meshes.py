"""How clients are placed changes nothing: one result on every mesh and with any number at a time, padding clients or none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax.federation import mesh
from dplora_jax.privacy import secrets
from tests.conftest import mostly_slow
from tests.federation import small

pytestmark = pytest.mark.usefixtures("quick_compile")
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
name = lambda s: f"{s.rows}x{s.columns}-wave{s.wave}-micro{s.microbatch}"  # noqa: E731


MESHES = [
    small.Setup(rows=8),
    small.Setup(wave=4, microbatch=4),
    small.Setup(rows=4, columns=2, wave=2, microbatch=3),
    small.Setup(rows=2, columns=4),
    small.Setup(columns=2),
]


@pytest.mark.parametrize("setup", mostly_slow(MESHES[2:3], MESHES), ids=name)
def test_five_clients_that_fill_no_mesh_release_the_same_on_each(setup):
    """Uploads, noisy gradients, the next state and private statistics; in waves and microbatches too."""
    one, other = small.run(), small.run(setup)
    jax.tree.map(close, other, one)


def test_a_dispatch_hands_its_state_on_as_it_came_over_a_model_axis_too():
    """Else the next dispatch, which is compiled already, refuses what this one gives it."""
    back = small.compiled(MESHES[2], len(small.ROUNDS)).output_shardings[0]
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(back))


def eight(setup):
    """The state after two rounds of eight clients: the five, and three of them again with secrets of their own."""
    again = [0, 1, 2, 3, 4, 2, 0, 3]
    grid, records = small.grid_of(setup), small.records()
    mechanisms = [small.MECHANISMS[k] for k in again]
    placed = mesh.place(grid, [records[k] for k in again], mechanisms, small.CLIP, setup.wave)
    keys = secrets.round_keys(secrets.from_seed(9, 8), range(1, 3), 0)
    params = small.model_and_params()[1]
    params = jax.device_put(params, mesh.base_sharding(grid, params))
    state = small.federation(setup).init(jax.tree.map(jnp.array, small.adapter()), 8)
    state = jax.device_put(state, NamedSharding(grid, PartitionSpec()))
    count = len(placed.clients.size)
    assert (count == 8) == (8 % (setup.rows * setup.wave) == 0)
    arguments = state, params, placed.clients, placed.data, mesh.place_keys(grid, keys, count)
    compiled = small.program(setup).lower(*arguments).compile(compiler_options=small.QUICKLY)
    return jax.tree.map(np.array, compiled(*arguments)[0])


@pytest.fixture(scope="module")
def alone():
    return eight(small.Setup(transcript=False, diagnostics=False))


FILLED = [
    small.Setup(4, 2, wave=2, transcript=False, diagnostics=False),
    small.Setup(2, 1, wave=3, transcript=False, diagnostics=False),
]


@pytest.mark.slow
@pytest.mark.parametrize("setup", FILLED, ids=name)
def test_eight_clients_that_fill_a_mesh_come_to_the_same_adapter(setup, alone):
    """The last of these pads each device's four clients to two waves of three."""
    jax.tree.map(close, eight(setup), alone)
    assert np.abs(alone.adapter["head"]["bias"] - small.adapter()["head"]["bias"]).max() > 1e-3
