"""Units of several rows: one sample, one clipped gradient, one null; whatever the rows are and however many."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dplora_jax import losses
from dplora_jax.errors import InputError
from dplora_jax.federation import client, frozen_layers, mesh, own_rows, pool, round, streaming, units
from dplora_jax.federation.silo import Server, Silo
from dplora_jax.privacy import accounting, group_privacy, sampling, secrets
from dplora_jax.privacy.clipping import clipped_grad_sum
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


@functools.cache
def batch(units_=4, rows=G, seed=0):
    """Units of 1 to `rows` rows, as the device gathers them."""
    rng = np.random.default_rng(seed)
    shape = units_, rows
    brought = (np.arange(rows) < rng.integers(1, rows + 1, (units_, 1))).astype(np.float32)
    return {
        "input_ids": rng.integers(0, 20, (*shape, 6)).astype(np.int32),
        "attention_mask": np.ones((*shape, 6), np.int32),
        "labels": rng.integers(0, 3, shape).astype(np.int32),
        "scale": rng.uniform(0.2, 30, shape).astype(np.float32),
        losses.BROUGHT: brought,
    }


@functools.cache
def clipped(form, mode="flat", **options):
    model, params = small.model_and_params()
    loss = losses.of_units(small.loss, model, params)
    return jax.jit(
        lambda adapter, batch, clip: clipped_grad_sum(loss, adapter, batch, clip, form=form, mode=mode, **options)
    )


def norm(tree):
    return np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree)))


@functools.cache
def by_definition():
    """Each unit's gradient, float64, and loss: of the mean of its rows' losses, one row of the model at a time."""
    model, params = small.model_and_params()
    one = jax.jit(jax.value_and_grad(lambda a, row: small.loss(model, params)(a, row)[0]))
    grads, values = [], []
    for u in range(4):
        brought = int(batch()[losses.BROUGHT][u].sum())
        parts = [
            one(small.adapter(), {n: x[u, g : g + 1] for n, x in batch().items() if n != losses.BROUGHT})
            for g in range(brought)
        ]
        grads.append(
            jax.tree.map(lambda *x: np.mean([np.asarray(y, np.float64) for y in x], 0), *(g for _, g in parts))
        )
        values.append(np.mean([v for v, _ in parts]))
    return grads, values


@pytest.mark.parametrize("form", ["vmap", "broadcast", "ghost"])
def test_every_form_clips_the_mean_gradient_of_a_units_rows(form):
    grads, values = by_definition()
    norms = np.array([norm(g) for g in grads])
    clip = float(np.sort(norms)[1])
    total, shown, of_units = clipped(form)(small.adapter(), batch(), clip)
    close(shown, norms, rtol=1e-4)
    close(of_units, values)
    factors = np.minimum(1, clip / norms)
    expected = jax.tree.map(lambda *x: sum(f * y for f, y in zip(factors, x, strict=True)), *grads)
    jax.tree.map(functools.partial(close, atol=1e-4 * clip), total, expected)


@pytest.mark.parametrize("mode", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("form", mostly_slow(["ghost"], ["vmap", "broadcast", "ghost"]))
def test_a_unit_moves_the_sum_by_no_more_than_the_clip_norm(form, mode):
    """Whatever its rows are: other rows, huge ones, rows that agree, more or fewer of them."""
    clip, rng = 0.1, np.random.default_rng(1)
    run = clipped(form, mode)
    null = {name: array.copy() for name, array in batch().items()}
    null[losses.BROUGHT][1] = 0
    without = run(small.adapter(), null, clip)[0]
    moved = []
    for attempt in range(20):
        changed = {name: array.copy() for name, array in batch().items()}
        changed["input_ids"][1] = rng.integers(0, 20, (1, 6)) if attempt % 2 else rng.integers(0, 20, (G, 6))
        changed["scale"][1] = 10.0 ** rng.uniform(-3, 6)
        changed[losses.BROUGHT][1] = np.arange(G) < rng.integers(1, G + 1)
        after = run(small.adapter(), changed, clip)[0]
        moved.append(norm(jax.tree.map(jnp.subtract, after, without)))
    assert max(moved) <= clip * (1 + 1e-5)
    assert max(moved) > 0.9 * clip


def test_integer_sums_clip_units_too():
    total, _, _ = clipped("auto", bits=12)(small.adapter(), batch(), 0.1)
    plain, _, _ = clipped("broadcast")(small.adapter(), batch(), 0.1)
    jax.tree.map(lambda i, x: close(i * 0.1 * 2.0**-12, x, atol=4 * 0.1 * 2.0**-11), total, plain)


@pytest.mark.parametrize("broken", [np.inf, np.nan])
def test_a_row_that_is_not_finite_silences_its_unit_alone(broken):
    hurt = batch() | {"scale": batch()["scale"].copy()}
    hurt["scale"][1, 0] = broken
    null = batch() | {losses.BROUGHT: batch()[losses.BROUGHT].copy()}
    null[losses.BROUGHT][1] = 0
    for form in ("vmap", "broadcast", "ghost"):
        jax.tree.map(close, *(clipped(form)(small.adapter(), rows, 0.5)[0] for rows in (hurt, null)))


def test_a_loss_of_ones_own_is_taken_by_unit():
    """Not a ModelLoss: each unit as a batch of one."""
    own = lambda model, params: lambda a, rows: (rows["x"] @ a["head"]).sum(-1)  # noqa: E731
    loss = losses.of_units(own, None, None)
    rows = {
        "x": np.arange(12.0, dtype=np.float32).reshape(2, 3, 2),
        losses.BROUGHT: np.array([[1, 1, 0], [1, 0, 0]], np.float32),
    }
    total, shown, _ = clipped_grad_sum(loss, {"head": np.ones((2, 2), np.float32)}, rows, 1e3)
    means = np.array([rows["x"][0, :2].mean(0), rows["x"][1, 0]])
    close(total["head"], np.broadcast_to(means.sum(0)[:, None], (2, 2)))
    close(shown, [np.sqrt(2) * np.linalg.norm(m) for m in means])


@functools.cache
def drawn(counts, most, draws=4000):
    """`sampling.subsets` of units of `counts` rows in so many steps -> (places, brought)."""
    keys = secrets.keys_of(small.SECRETS[:1], "rows", [1], 0)[0, 0]
    one = lambda step: sampling.subsets(keys, step, jnp.array(counts), most)  # noqa: E731
    return jax.device_get(jax.vmap(one)(jnp.arange(draws)))


def test_a_unit_brings_all_of_its_rows_or_a_uniform_subset_of_them():
    """Chi-square over the ten subsets of three of five rows, wrong once in 10^4."""
    places, brought = drawn((1, 3, 5), 3)
    assert (brought.sum(-1) == [1, 3, 3]).all()
    assert (np.sort(places[:, 1]) == [0, 1, 2]).all()
    assert (places[:, 0] == 0).all()
    subsets, counts = np.unique(np.sort(places[:, 2]), axis=0, return_counts=True)
    assert len(subsets) == 10
    assert (np.diff(subsets) > 0).all()
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_no_two_steps_rounds_attempts_or_clients_draw_the_same_rows():
    keys = np.concatenate(
        [secrets.keys_of(small.SECRETS, "rows", [1, 2], attempt).reshape(-1, 4, 2) for attempt in (0, 1)]
    )
    steps = jax.vmap(lambda keys: jax.vmap(lambda t: sampling.subsets(keys, t, jnp.array([1000]), 8)[0])(jnp.arange(2)))
    rows = np.array(steps(keys)).reshape(-1, 8)
    assert len(np.unique(rows, axis=0)) == len(rows)


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
        assert set(x[brought > 0].tolist()) == own
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


def test_group_privacy_of_one_record_is_the_accountants_and_of_more_is_more():
    """The control: what rows in place of units cost a person with four of them, less than the rule for groups of rows says."""
    one, four = (group_privacy.epsilon(0.1, 4.0, 20, 1e-5, count) for count in (1, 4))
    assert one == pytest.approx(accounting.epsilon(accounting.Mechanism(400, 0.1, 400, 4.0), 20, 1e-5), rel=2e-2)
    assert 3 * one < four < 6 * one
