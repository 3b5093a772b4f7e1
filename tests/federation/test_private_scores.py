"""Scores on what clients keep back: it never trains, each evaluation is paid for before it is made, and noise covers it."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from dplora_jax import evaluation, losses
from dplora_jax.config import replace
from dplora_jax.errors import InputError
from dplora_jax.federation import held_out, own_rows, private_scores
from dplora_jax.privacy import unit_scores
from tests.federation import private_scoring
from tests.federation import small_federation as small
from tests.federation.private_scoring import KEYS, changed, entries, kept, run, run_lazily, same

pytestmark = pytest.mark.usefixtures("quick_compile")
EXACT = {"trust": "none", "epsilon": None}


@pytest.fixture(scope="module")
def federation():
    return private_scoring.maker()


def test_what_is_kept_back_never_trains(federation):
    """Other records in its place change no bit of the adapter, and other records anywhere else do."""
    plain, other, trained = federation(), federation(), federation()
    held = kept(plain)
    run(plain)
    run(other, changed(other, lambda client: held.parts[client].places))
    assert same(plain.adapter, other.adapter)
    rest = lambda client: np.setdiff1d(np.arange(small.SIZES[client]), held.parts[client].places)  # noqa: E731
    run(trained, changed(trained, rest))
    assert not same(plain.adapter, trained.adapter)


def test_what_trains_is_not_scored(federation):
    """At the base model, before anything was trained."""
    first = lambda made, shards=None: next(iter(run_lazily(made, shards))).metrics  # noqa: E731
    made = federation()
    held = kept(made)
    rest = lambda client: np.setdiff1d(np.arange(small.SIZES[client]), held.parts[client].places)  # noqa: E731
    assert first(made) == first(federation(), changed(made, rest))
    assert first(made) != first(federation(), changed(made, lambda client: held.parts[client].places))


@pytest.mark.parametrize("method", ["fedavg", "fedex"])
def test_without_privacy_scores_are_exact(federation, method):
    """Those of the released model, with what its aggregation folded into the base."""
    server = {} if method == "fedavg" else {"server_momentum": 0.0}
    made = federation(**EXACT, aggregation=method, ema=0.0, **server)
    held, rounds = kept(made), run(made)
    rows = {name: np.concatenate([part.rows[name] for part in held.parts.values()]) for name in small.rows(1, 0)}
    found = made.evaluate(evaluation.on(rows))
    assert rounds[-1].metrics["private_accuracy"] == pytest.approx(found["accuracy"])
    assert rounds[-1].metrics["private_macro_f1"] == pytest.approx(found["macro_f1"])
    assert math.isinf(float(rounds[-1].line["private_test_epsilon"]))
    assert any("EXACT" in line for line in made.describe()["trust"])


def test_what_is_released_is_the_sum_of_all_clients_noisy_counts(federation, monkeypatch):
    shares, totals = [], []
    noisy, metrics = unit_scores.noisy, unit_scores.Labels.metrics
    monkeypatch.setattr(unit_scores, "noisy", lambda *args: (shares.append(noisy(*args)), shares[-1])[1])
    monkeypatch.setattr(
        unit_scores.Labels, "metrics",
        lambda self, total, units, std: (totals.append((total, units, std)), metrics(self, total, units, std))[1],
    )  # fmt: skip
    made = federation()
    next(run_lazily(made))
    ((total, units, std),) = totals
    noise = held_out.noise_multiplier(made.config)
    assert np.array_equal(total, np.sum(shares, 0) / 2.0 ** unit_scores.grid_bits(noise))
    assert units == 15
    assert std == pytest.approx(noise * math.sqrt(3))


def test_without_a_private_test_nothing_changes(federation, tmp_path):
    run(federation(private_test=0.0), workdir=tmp_path / "run")
    assert entries(tmp_path / "run").evaluated == []
    assert "private" not in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "fields", [{"mesh": "3x1"}, {"mesh": "2x2"}, {"mesh": "1x1", "wave": 2}, {"mesh": "2x1", "stream": True}]
)
def test_scores_are_the_same_on_any_mesh(federation, fields):
    first = lambda made: next(run_lazily(made)).metrics  # noqa: E731
    assert first(federation(**fields)) == first(federation())


def test_rows_are_given_back_to_the_client_they_are_of(federation, monkeypatch):
    """More rows than fit in a batch, unequal clients, on several devices."""
    monkeypatch.setattr(evaluation, "ROWS", 2)
    made = federation(mesh="2x1")
    held = kept(made)
    prepared = made.prepare(held_out.split(made.config, small.shards(), KEYS)[0])
    tables = {k: part.rows for k, part in held.parts.items()}
    found = own_rows.by_client(prepared, tables, lambda params, adapter, batch: batch["input_ids"].sum(1), held.rows)(
        None
    )
    assert {k: v.tolist() for k, v in found.items()} == {k: t["input_ids"].sum(1).tolist() for k, t in tables.items()}


def test_every_client_is_scored_by_its_own_model_where_it_has_one(federation):
    made = federation(**EXACT, aggregation="fedsa", client_lr=4.0, head_lr=0.01, ema=0.0)
    shown, held = run(made)[-1].metrics, kept(made)
    hits = 0
    for client, part in held.parts.items():
        one = made.evaluate(evaluation.on(part.rows))
        hits += one["accuracy_by_client"][client] * len(part.units)
    assert shown["private_accuracy"] == pytest.approx(hits / 15)


def test_a_language_models_losses_are_measured_on_the_rows_that_it_would_train_on(federation):
    """The rows' mean losses by the loss itself, a classifier's standing in for a language model's here."""
    made = federation(**EXACT)
    held, training = kept(made), held_out.split(made.config, small.shards(), KEYS)[0]
    prepared = made.prepare(training)
    loss = losses.classification(prepared.model, prepared.params)
    parts = {
        k: part._replace(rows={("said" if n == "labels" else n): x for n, x in part.rows.items()})
        for k, part in held.parts.items()
    }
    renamed = lambda model, params: lambda adapter, batch: loss(adapter, batch | {"labels": batch["said"]})  # noqa: E731
    wider = dataclasses.replace(prepared.model, config=dataclasses.replace(prepared.model.config, vocab_size=1000))
    measure = private_scores.of_rows(renamed, prepared._replace(model=wider), held._replace(parts=parts))
    assert measure.kind == unit_scores.Losses(math.log(1000))
    for client, found in measure.run(prepared.adapter).items():
        assert np.allclose(found, loss(prepared.adapter, held.parts[client].rows), atol=1e-5)
        assert np.array_equal(measure.units[client], held.parts[client].units), "by unit, and not by row"


def by_unit(sizes=(5, 7, 4)):
    """The clients' records, of as many units of one row or more."""
    rng = np.random.default_rng(0)
    return [
        shard | {"unit": np.concatenate([np.arange(n), rng.integers(0, n, len(shard["labels"]) - n)]).astype(np.int32)}
        for shard, n in zip(small.shards(), sizes, strict=True)
    ]


def exact_by_unit(federation, **fields):
    """(the first round's scores, {client: Part}, what the base model says of each client's own rows)."""
    made = federation(**EXACT, expected_batch_size=2.0, private_test=0.4, unit_rows=2, **fields)
    held = held_out.split(made.config, by_unit(), KEYS)[1]
    first = next(run_lazily(made, by_unit()))
    model, params = small.model()
    logits = {k: model.apply(params, part.rows, made.prepared.adapter) for k, part in held.parts.items()}
    return first.metrics, held, {k: np.asarray(jax.nn.log_softmax(x)) for k, x in logits.items()}


def test_a_person_counts_once_however_many_rows_it_has(federation):
    """By the share of its rows that are right; none of its rows trains."""
    shown, held, likely = exact_by_unit(federation, privacy_unit="column:who")
    assert held.units == [2, 3, 2]
    right = [
        np.mean((likely[k].argmax(1) == part.rows["labels"])[part.units == unit])
        for k, part in held.parts.items()
        for unit in np.unique(part.units)
    ]
    assert len(right) == 7
    assert shown["private_accuracy"] == pytest.approx(np.mean(right), abs=1e-5)


def test_a_text_in_several_rows_has_one_label(federation, monkeypatch):
    """The likeliest over all of them, as on a public test set."""
    shards = [
        {name: array[np.argsort(shard["unit"], kind="stable")] for name, array in shard.items()} for shard in by_unit()
    ]
    for shard in shards:
        shard["labels"] = shard["unit"] % 3
    monkeypatch.setattr("tests.federation.test_private_scores.by_unit", lambda: shards)
    shown, held, likely = exact_by_unit(federation)
    right = [
        likely[k][part.units == unit].sum(0).argmax() == unit % 3
        for k, part in held.parts.items()
        for unit in np.unique(part.units)
    ]
    assert shown["private_accuracy"] == pytest.approx(np.mean(right), abs=1e-5)


def test_what_is_not_said_counts_as_wrong():
    labels = np.array([0, 1, 2, 2])
    said = np.array([0, 2, evaluation.UNDECIDED, 2])
    outcomes = private_scores.pairs(labels, said, 3)
    assert (outcomes // 3).tolist() == labels.tolist()
    assert (outcomes % 3 == labels).tolist() == [True, False, False, True]


def test_silos_refuse_it_by_name():
    from dplora_jax.federation import silo

    with pytest.raises(InputError, match="leave out `private_test`"):
        silo._settled(replace(small.config(), private_test=0.25), small.SIZES)
