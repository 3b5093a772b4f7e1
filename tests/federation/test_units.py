"""Units of several rows: one sample, one clipped gradient, one null; whatever the rows are and however many."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from dplora_jax import losses
from dplora_jax.errors import InputError
from dplora_jax.federation import client, frozen_layers, mesh, own_rows, pool, round, streaming, units
from dplora_jax.federation.silo import Server, Silo
from dplora_jax.privacy import secrets
from tests.conftest import mostly_slow
from tests.federation import small, small_federation

pytestmark = pytest.mark.usefixtures("quick_compile")
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
G = 3
UNIT = units.UNIT


def shards(rows_each=4):
    """Records of the clients of `small`, each of whom has as many units as records there, of 1 to `rows_each` rows."""
    rng = np.random.default_rng(5)
    made = []
    for size in small.SIZES:
        count = rng.integers(1, rows_each + 1, size)
        number = rng.permutation(np.repeat(np.arange(size), count)).astype(np.int32)
        n = len(number)
        made.append(
            {
                "input_ids": rng.integers(0, 20, (n, 6)).astype(np.int32),
                "attention_mask": (np.arange(6) < rng.integers(2, 7, (n, 1))).astype(np.int32),
                "labels": rng.integers(0, 3, n).astype(np.int32),
                "scale": rng.uniform(0.2, 2, n).astype(np.float32),
                UNIT: number,
            }
        )
    return made


def federation(setup, streamed=False, most=G):
    """The static part of `small`'s rounds, of units."""
    made, layout = small.federation(setup), units.Units(most)
    batches = streaming.Streamed() if streamed else layout.batches
    return dataclasses.replace(
        made, loss=layout.loss(small.loss), local=dataclasses.replace(made.local, batches=batches)
    )


def keys_of(setup, numbers):
    return small.keys_of(setup, numbers) | {"rows": secrets.keys_of(small.SECRETS, "rows", numbers, 0)}


def run(setup, records, numbers=(1, 2), streamed=False, most=G):
    """(state, transcript) of rounds `numbers` of clients with `records` (dicts with `unit`)."""
    made, grid, layout = federation(setup, streamed, most), small.grid_of(setup), units.Units(most)
    rows, spans = layout.arranged(records)
    state, params, *_ = small.arguments(setup, numbers)
    placed = mesh.place(
        grid, rows, small.mechanisms(setup.trust), small.CLIP, setup.wave, None, list(small.SIZES), streamed, spans
    )
    count, program = len(placed.clients.size), round.make(made, grid, transcript=True)
    if not streamed:
        keys = mesh.place_keys(grid, keys_of(setup, numbers), count)
        state, (public, _, _) = program(state, params, placed.clients, placed.data, keys)
        return jax.tree.map(np.array, (state, jax.tree.map(lambda x: x[:, :5], public)))
    stream, shown = streaming.Stream(made.local, jax.device_get(placed.clients), rows, grid, layout, spans), []
    for number in numbers:
        state, (public, _, _) = program(state, params, placed.clients, {}, stream.round(keys_of(setup, [number])))
        shown.append(jax.tree.map(lambda x: np.array(x)[:, :5], public))
    return jax.tree.map(np.array, state), jax.tree.map(lambda *x: np.concatenate(x), *shown)


def test_units_of_one_row_are_records():
    """The same noise and the same samples: what rounds of records release, rounds of such units do."""
    records = [rows | {UNIT: np.arange(len(rows["labels"]))} for rows in small.records()]
    state, public, _ = small.run(small.Setup(diagnostics=False), rounds=(1, 2))
    jax.tree.map(close, run(small.Setup(), records, most=1), (state, public))


WAYS = {
    "streamed": (small.Setup(), {"streamed": True}),
    "a few at a time": (small.Setup(microbatch=2), {}),
    "in a pool": (small.Setup(local_steps=1, wave=5, pool=pool.rows(small.MECHANISMS)), {}),
    "in a pool, streamed": (small.Setup(local_steps=1, wave=5, pool=7, microbatch=3), {"streamed": True}),
    "on 2x2 devices": (small.Setup(rows=2, columns=2, wave=2), {}),
    "on 2x2 devices, streamed": (small.Setup(rows=2, columns=2, wave=2), {"streamed": True}),
}


@pytest.mark.parametrize("way", mostly_slow(["streamed", "in a pool"], WAYS))
def test_every_way_takes_the_same_rows(way):
    setup, how = WAYS[way]
    plain = run(small.Setup(local_steps=setup.local_steps), shards())
    jax.tree.map(close, run(setup, shards(), **how), plain)


MODES = [
    {"clipping": "per_layer"},
    {"clipping": "automatic"},
    {"clipping": "adaptive"},
    {"bands": 2},
    {"bands": 2, "planned": 3, "local_steps": 1},
    {"trust": "distributed", "local_steps": 1},
]


@pytest.mark.parametrize("fields", mostly_slow(MODES[:1], MODES), ids=str)
def test_a_unit_made_null_is_one_record_made_null(fields):
    """In each mode, a unit whose rows have no loss releases what a unit of one such row does: how many it had does not show."""
    setup = small.Setup(**fields)
    many = shards()
    own = many[2][UNIT] == 5
    assert own.sum() > 1
    many[2] = many[2] | {"scale": np.where(own, 0, many[2]["scale"]).astype(np.float32)}
    first = np.flatnonzero(own)[0]
    kept = ~own | (np.arange(len(own)) == first)
    few = [*many]
    few[2] = {name: array[kept] for name, array in many[2].items()}
    jax.tree.map(close, run(setup, many), run(setup, few))


def test_rows_that_a_unit_has_not_are_its_own_first_one_and_weigh_nothing():
    rows, spans = units.Units(G).arranged(
        [{"x": np.arange(5), "attention_mask": np.ones((5, 1)), UNIT: np.array([7, 3, 7, 9, 3])}]
    )
    np.testing.assert_array_equal(rows[0]["x"], [1, 4, 0, 2, 3])
    np.testing.assert_array_equal(spans.spans[0], [[0, 2], [2, 2], [4, 1]])
    batches, data = units.Units(G).batches, {"x": rows[0]["x"], units.SPANS: spans.spans[0]}
    local = small.federation(small.Setup()).local
    one = client.Client(*[np.int32(0)] * len(client.Client._fields))._replace(
        size=3, population=3, join_below=1 << 30, capacity=3
    )
    keys = {name: value[0, 0] for name, value in keys_of(small.Setup(), [1]).items()}
    local = dataclasses.replace(local, records=3, capacity=3)
    made, weights = batches.batch(local, data, one, keys, 0)
    assert (np.asarray(weights) == 1).all()
    for x, brought in zip(np.array(made["x"]), np.array(made[losses.BROUGHT]), strict=True):
        own = {1: {1, 4}, 4: {1, 4}, 0: {0, 2}, 2: {0, 2}, 3: {3}}[int(x[0])]
        assert x.shape == (G,)
        assert sorted(x[brought > 0].tolist()) == sorted(own)
        assert set(x.tolist()) == own


# A federation as a person builds it.

UNITS = {"privacy_unit": "column:person", "unit_rows": 2}


def people(rows_each=3):
    rng = np.random.default_rng(0)
    made = []
    for seed, size in enumerate(small_federation.SIZES):
        count = rng.integers(1, rows_each + 1, size)
        made.append(small_federation.rows(int(count.sum()), seed) | {UNIT: np.repeat(np.arange(size), count)})
    return made


def test_a_federation_of_units_is_accounted_by_units():
    """Sizes, rates and noise are those of as many records; what is charged is too."""
    of_units, of_records = small_federation.federation(**UNITS), small_federation.federation()
    rounds = list(of_units.fit(people()))
    list(of_records.fit(small_federation.shards()))
    assert of_units.prepared.sizes == small_federation.SIZES
    assert of_units.prepared.mechanisms == of_records.prepared.mechanisms
    assert rounds[-1].epsilon == of_records.history[-1]["epsilon"]


def test_streaming_and_the_device_release_the_same_adapter():
    one, other = (small_federation.federation(**UNITS, stream=stream) for stream in (False, True))
    for made in (one, other):
        list(made.fit(people()))
    jax.tree.map(close, one.adapter, other.adapter)


TIMES = ("seconds", "examples_per_second")


@pytest.mark.parametrize("fields", [{}, {"private_test": 0.3, "eval_every": 4}], ids=["trained on", "kept back"])
def test_more_rows_of_a_person_change_no_public_number(tmp_path, fields):
    """How many rows each person has is in no file that a run shows, and decides no shape of a step or of a score."""
    shown, shapes = [], []
    run = own_rows.by_client
    for rows_each in (1, 6):
        workdir = tmp_path / str(rows_each)
        made = small_federation.federation(**UNITS, **{"eval_every": 0} | fields)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(own_rows, "_batch", lambda *a, f=own_rows._batch: shapes.append(a[1:]) or f(*a))
            list(made.fit(people(rows_each), workdir))
        assert own_rows.by_client is run
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        names = [[name for name in line if "private_" in name] for line in lines]
        lines = [
            {n: x for n, x in line.items() if n not in (*TIMES, *own)} for line, own in zip(lines, names, strict=True)
        ]
        shown.append((lines, names, (workdir / "config.json").read_text(), made.prepared.model))
    assert shown[0] == shown[1]
    assert shapes[: len(shapes) // 2] == shapes[len(shapes) // 2 :]
    assert bool(shapes) == bool(fields)


@pytest.mark.parametrize("wrong", ["short", "long", "nan", "two axes"])
def test_units_that_are_no_numbers_of_rows_are_refused(wrong):
    records = people()
    own = records[0][UNIT]
    records[0][UNIT] = {"short": own[:-5], "long": np.append(own, 0), "nan": own * np.nan, "two axes": own[:, None]}[
        wrong
    ]
    with pytest.raises(InputError, match="one whole number for each row"):
        small_federation.federation(**UNITS).prepare(records)


def test_what_a_step_computes_does_not_tell_whether_rows_fit_in_memory(monkeypatch):
    """Rows of people have no public bound: the frozen layers' outputs are kept or the run is refused; nothing streams unasked."""
    config, model = small_federation.config(**UNITS), small_federation.model()
    held = units.layout(config).most_rows(60)
    assert held is None
    assert not streaming.wanted(config, None, {}, held)
    assert units.layout(small_federation.config(unit_rows=4)).most_rows(60) == 240
    monkeypatch.setattr(frozen_layers, "first_adapted", lambda config, model: 1)
    monkeypatch.setattr(frozen_layers, "CACHE_BYTES", 4 * 100 * 6 * 8)
    assert frozen_layers.split(config, *model, held, 6, held=100)[0].start == 1
    with pytest.raises(InputError, match="would not fit in memory"):
        frozen_layers.split(config, *model, held, 6, held=101)


@pytest.mark.parametrize(
    ("fields", "records", "words"),
    [(UNITS, small_federation.shards, "have no `unit`"), ({}, people, "privacy_unit=record")],
)
def test_records_that_do_not_fit_the_unit_are_refused(fields, records, words):
    with pytest.raises(InputError, match=words):
        small_federation.federation(**fields).prepare(records())


@pytest.mark.slow
def test_silos_of_units_come_to_the_federations_adapter():
    config, sizes = small_federation.config(**UNITS), small_federation.SIZES
    model, params = small_federation.model()
    silos = [
        Silo(model, params, losses.classification, config, client=k, records=rows, sizes=sizes)
        for k, rows in enumerate(people())
    ]
    server = Server(model, params, losses.classification, config, sizes)
    for number in range(1, config.schedule.rounds + 1):
        server.aggregate({k: one.fit(server.adapter, number) for k, one in enumerate(silos)})
    together = small_federation.federation(**UNITS)
    list(together.fit(people()))
    jax.tree.map(close, server.released, together.adapter)


OTHERS = [{"noise": "hardened"}, {"trust": "none", "epsilon": None}]


@pytest.mark.parametrize("fields", mostly_slow(OTHERS[:1], OTHERS), ids=str)
def test_other_noises_and_none_take_units(fields):
    made = small_federation.federation(**UNITS, **fields)
    assert list(made.fit(people()))[-1].number == 4
