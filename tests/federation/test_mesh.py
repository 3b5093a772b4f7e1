"""What lies where, and which meshes are refused."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dplora_jax.errors import InputError
from dplora_jax.federation import mesh
from dplora_jax.privacy import sampling
from tests.federation import small


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("16x1", "needs 16 devices, and there are 8"),
        ("4x4", "needs 16 devices"),
        ("2x3", "does not divide"),
        ("1x8", "does not divide"),
        *((spec, "must be CLIENTSxMODEL") for spec in ("8", "x", "0x1", "4x0", "ax1", "2x2x2", "-1x1", "1.5x1", "")),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(spec, message):
    """1x8: the tiny model has 4 heads."""
    with pytest.raises(InputError, match=message):
        mesh.make(spec, 5, small.model_and_params()[0])


@pytest.mark.parametrize(
    ("spec", "clients", "shape"), [("auto", 5, (5, 1)), ("auto", 20, (8, 1)), ("2X4", 5, (2, 4)), ("4x2", 1, (4, 2))]
)
def test_the_mesh_has_a_clients_and_a_model_axis(spec, clients, shape):
    made = mesh.make(spec, clients, small.model_and_params()[0])
    assert tuple(made.shape.items()) == (("clients", shape[0]), ("model", shape[1]))


@pytest.mark.parametrize(
    ("rows", "columns", "wave", "padded"), [(1, 1, 1, 5), (8, 1, 1, 8), (4, 1, 1, 8), (2, 1, 2, 8), (1, 1, 5, 5)]
)
def test_each_client_finds_its_own_records_on_its_own_device(rows, columns, wave, padded):
    grid, shards = mesh.make(f"{rows}x{columns}", 5, small.model_and_params()[0]), small.records()
    placed = mesh.place(grid, shards, small.MECHANISMS, small.CLIP, wave)
    clients = jax.device_get(placed.clients)
    assert {len(field) for field in clients} == {padded}
    assert (placed.records, placed.capacity) == (max(small.SIZES), max(small.CAPACITIES))
    per_device = padded // rows
    for name, array in placed.data.items():
        devices = np.asarray(array).reshape(rows, -1, *array.shape[1:])
        for client, shard in enumerate(shards):
            own = slice(clients.offset[client], clients.offset[client] + clients.size[client])
            np.testing.assert_array_equal(devices[client // per_device][own], shard[name])


@pytest.fixture
def hosts(monkeypatch):
    """Eight devices as two processes' four each, found in another order than they lie."""
    monkeypatch.setattr(mesh, "_process", lambda device: device.id % 2)


@pytest.mark.parametrize(
    ("spec", "clients", "wave", "first", "second"),
    [
        ("auto", 5, 1, [0, 1, 2], [3, 4]),
        ("auto", 1, 1, [0], []),
        ("auto", 20, 1, list(range(12)), list(range(12, 20))),
        ("2x1", 5, 2, [0, 1, 2, 3], [4]),
        ("4x2", 5, 1, [0, 1, 2, 3], [4]),
        ("1x2", 3, 1, [0, 1, 2], [0, 1, 2]),
    ],
)
def test_a_client_belongs_to_the_process_whose_devices_compute_it(hosts, spec, clients, wave, first, second):
    """With 1x2, a client's row lies on both, which must then both hold its records."""
    grid = mesh.make(spec, clients, small.model_and_params()[0])
    assert [mesh.own_clients(grid, clients, wave, process) for process in (0, 1)] == [first, second]
    places = [device.id % 2 for device in grid.devices.flat]
    assert places == sorted(places)
    assert places.count(0) == places.count(1)


@pytest.mark.parametrize("spec", ["3x1", "1x1"])
def test_a_mesh_that_leaves_a_process_out_is_refused(hosts, spec):
    with pytest.raises(InputError, match="the 2 processes cannot give in equal parts"):
        mesh.make(spec, 5, small.model_and_params()[0])


def test_other_clients_records_are_not_looked_at(hosts, monkeypatch):
    """A process that must hold its own clients' blocks alone places the same arrays from its own records alone."""
    grid, shards = mesh.make("8x1", 5, small.model_and_params()[0]), small.records()
    whole = mesh.place(grid, shards, small.MECHANISMS, small.CLIP, 1)
    own = mesh.own_clients(grid, 5, 1, 0)
    empty = [shard if k in own else {name: a[:0] for name, a in shard.items()} for k, shard in enumerate(shards)]
    asked = []

    def make(shape, sharding, block):
        indices = [index for device, index in sharding.devices_indices_map(shape).items() if device.id % 2 == 0]
        asked.append([block(index) for index in indices])

    monkeypatch.setattr(mesh.jax, "process_count", lambda: 2)
    monkeypatch.setattr(mesh.jax, "make_array_from_callback", make)
    mesh.place(grid, empty, small.MECHANISMS, small.CLIP, 1, sizes=small.SIZES)
    for blocks, array in zip(asked, whole.data.values(), strict=False):
        np.testing.assert_array_equal(np.concatenate(blocks), np.asarray(array)[: sum(map(len, blocks))])


def test_what_the_program_knows_of_a_client_is_its_public_mechanism():
    """The divisor is the expected batch, the noise is sigma times the clipping norm, and weights are n_k / n."""
    grid = mesh.make("8x1", 5, small.model_and_params()[0])
    clients = jax.device_get(mesh.place(grid, small.records(), small.MECHANISMS, small.CLIP, 1).clients)
    for index, mechanism in enumerate(small.MECHANISMS):
        assert clients.size[index] == mechanism.records == small.SIZES[index]
        assert clients.capacity[index] == mechanism.capacity
        assert clients.join_below[index] == sampling.threshold(mechanism.sampling_rate)
        assert clients.divisor[index] == pytest.approx(min(small.EXPECTED, small.SIZES[index]))
        assert clients.noise_std[index] == pytest.approx(mechanism.noise_multiplier * small.CLIP)
        assert clients.weight[index] == pytest.approx(small.SIZES[index] / sum(small.SIZES))


def test_padding_clients_have_no_weight_no_records_and_no_noise():
    grid = mesh.make("8x1", 5, small.model_and_params()[0])
    clients = jax.device_get(mesh.place(grid, small.records(), small.MECHANISMS, small.CLIP, 1).clients)
    for name in ("weight", "size", "join_below", "capacity", "noise_std", "offset"):
        assert (getattr(clients, name)[5:] == 0).all(), name
    assert (clients.divisor[5:] == 1).all()
    assert clients.weight.sum() == pytest.approx(1)


def test_the_base_is_split_over_the_model_axis_and_whole_without_one():
    _, params = small.model_and_params()
    whole = mesh.base_sharding(mesh.make("8x1", 5, small.model_and_params()[0]), params)
    split = mesh.base_sharding(mesh.make("2x4", 5, small.model_and_params()[0]), params)
    assert all(s.spec == PartitionSpec() for s in jax.tree.leaves(whole))
    assert split["layers"]["query"]["kernel"].spec == PartitionSpec(None, None, "model")
    assert split["embed"]["word"].spec == PartitionSpec(None, "model")
    assert split["head"]["kernel"].spec == PartitionSpec()  # 3 labels do not split in 4


def test_keys_are_padded_for_padding_clients_and_kept_for_the_others():
    grid = mesh.make("4x1", 5, small.model_and_params()[0])
    keys = {"noise": np.arange(3 * 5 * 8, dtype=np.uint32).reshape(3, 5, 4, 2)}
    placed = mesh.place_keys(grid, keys, 8)["noise"]
    assert placed.shape == (3, 8, 4, 2)
    np.testing.assert_array_equal(np.asarray(placed)[:, :5], keys["noise"])
    assert placed.sharding.spec == PartitionSpec(None, "clients")
