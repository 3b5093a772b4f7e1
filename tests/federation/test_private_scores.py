"""Scores on what clients keep back: it never trains, each evaluation is paid for before it is made, and noise covers it."""

import collections
import dataclasses
import math
import shutil

import jax
import numpy as np
import pytest

from dplora_jax import evaluation, losses
from dplora_jax.config import replace
from dplora_jax.errors import InputError
from dplora_jax.federation import held_out, own_rows, private_scores, storage
from dplora_jax.federation.federation import Federation
from dplora_jax.privacy import accounting, secrets, unit_scores
from dplora_jax.privacy.ledger import Ledger
from tests.federation import small_federation as small

pytestmark = pytest.mark.usefixtures("quick_compile")
KEYS = secrets.from_seed(3, 3)
EXACT = {"trust": "none", "epsilon": None}


@pytest.fixture(scope="module")
def programs():
    return {}


@pytest.fixture
def federation(programs):
    def make(**fields):
        config = small.config(**({"private_test": 0.25} | fields))
        return Federation(*small.model(), losses.classification, config, programs=programs)

    return make


def run(made, shards=None, workdir=None, **options):
    return list(made.fit(shards or small.shards(), workdir or storage.InMemory(), **options))


def kept(made):
    return held_out.split(made.config, small.shards(), KEYS)[1]


def changed(made, places_of):
    """The shards with the records at `places_of(client)` labelled and worded otherwise."""
    shards = small.shards()
    for client, shard in enumerate(shards):
        places = places_of(client)
        shard["labels"][places] = (shard["labels"][places] + 1) % 3
        shard["input_ids"][places] = (shard["input_ids"][places] + 7) % 20
    return shards


def same(one, other):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def entries(workdir):
    return Ledger(workdir / "privacy_ledger.jsonl", mend=False)


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


def run_lazily(made, shards=None):
    return made.fit(shards or small.shards(), storage.InMemory())


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


def test_each_evaluation_is_an_entry_of_its_own_and_the_ledger_knows_its_cost(federation, tmp_path):
    made = federation(private_test_epsilon=5.0)
    rounds = run(made, workdir=tmp_path / "run")
    ledger = entries(tmp_path / "run")
    assert [entry["round"] for entry in ledger.evaluated] == [0, 2, 4]
    assert len(ledger.evaluated) == held_out.evaluations(made.config)
    assert ledger.test_epsilon(1e-3) == pytest.approx(5.0, rel=1e-3)
    assert ledger.test_epsilon(1e-3) <= 5.0
    assert max(ledger.epsilons(1e-3)) <= 8.0
    spent = [round.line["private_test_epsilon"] for round in rounds if "private_accuracy" in round.metrics]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(ledger.test_epsilon(1e-3))


def test_an_evaluation_is_charged_before_anything_is_computed(federation, tmp_path, monkeypatch):
    calls = []
    watched = [(Ledger, "evaluate"), (Ledger, "commit"), (storage.Workdir, "save"), (storage.Workdir, "release")]
    for owner, name in [*watched, (private_scores, "_outcomes"), (unit_scores, "total"), (unit_scores, "noisy")]:
        inner = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, name=name, inner=inner, **more: (calls.append(name), inner(*args, **more))[1]
        )
    run(federation(), workdir=tmp_path / "run")
    one = ["evaluate", "_outcomes", *["total", "noisy"] * 3, "save"]
    assert calls == [*one, "release", *[*one, "commit", "release"] * 2, "release"]


def crash_in_round(monkeypatch, number):
    """Make the evaluation of this round end the run as a crash would, when noise is drawn and nothing is released."""
    inner = unit_scores.noisy
    evaluations = iter([0, 2, 4])
    seen = collections.Counter()

    def crash(*args):
        seen["calls"] += 1
        if seen["calls"] % 3 == 1:
            seen["round"] = next(evaluations)
        drawn = inner(*args)
        if seen["round"] == number:
            raise KeyboardInterrupt
        return drawn

    monkeypatch.setattr(unit_scores, "noisy", crash)


def noise_keys(monkeypatch):
    """The keys of all noise that is drawn from here on, as a list."""
    keys, inner = [], unit_scores.noisy
    monkeypatch.setattr(
        unit_scores, "noisy", lambda summed, noise, bits, key: (keys.append(key), inner(summed, noise, bits, key))[1]
    )
    return keys


@pytest.mark.parametrize(("number", "shown"), [(0, [0, 4]), (2, [0, 4]), (4, [0, 2])])
def test_an_evaluation_that_a_crash_cut_off_stays_paid_for(federation, tmp_path, monkeypatch, number, shown):
    """Three are planned. A lost one is not made again for nothing: one is missing, and while there is one, it is kept for the
    last round. No key is used twice, and the budget holds."""
    keys = noise_keys(monkeypatch)
    with monkeypatch.context() as broken:
        crash_in_round(broken, number)
        with pytest.raises(KeyboardInterrupt):
            run(
                federation(seed=None, noise_multiplier=1.0, epsilon=None, private_test_epsilon=8.0),
                workdir=tmp_path / "run",
            )
    rounds = run(
        federation(seed=None, noise_multiplier=1.0, epsilon=None, private_test_epsilon=8.0), workdir=tmp_path / "run"
    )
    ledger = entries(tmp_path / "run")
    assert [round.number for round in rounds if "private_accuracy" in round.metrics] == shown
    assert len(ledger.evaluated) == 3
    assert ledger.test_epsilon(1e-3) <= 8.0
    assert len(set(keys)) == len(keys) == 7, "three clients' of two evaluations, and one of the lost"


def test_with_a_seed_a_lost_evaluation_is_made_again_as_it_was(federation, tmp_path, monkeypatch):
    whole = run(federation())
    with monkeypatch.context() as broken:
        crash_in_round(broken, 2)
        with pytest.raises(KeyboardInterrupt):
            run(federation(), workdir=tmp_path / "run")
    rounds = run(federation(), workdir=tmp_path / "run")
    assert [round.metrics for round in rounds] == [round.metrics for round in whole]
    assert [entry["round"] for entry in entries(tmp_path / "run").evaluated] == [0, 2, 4]


def test_a_run_that_was_left_keeps_back_the_same_records(federation, tmp_path):
    made = federation(seed=None)
    for round in made.fit(small.shards(), tmp_path / "run"):
        if round.number == 2:
            break
    first = secrets.load(tmp_path / "run" / "private")
    places = [p.places.tolist() for p in held_out.split(made.config, small.shards(), first)[1].parts.values()]
    held, inner = [], held_out.split
    again = federation(seed=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "split", lambda *args: (held.append(inner(*args)), held[-1])[1])
        run(again, workdir=tmp_path / "run")
    assert [part.places.tolist() for part in held[0][1].parts.values()] == places
    assert not (tmp_path / "run" / "private" / secrets.FILE).exists()


def test_no_two_clients_rounds_or_attempts_share_noise(federation, monkeypatch):
    keys = noise_keys(monkeypatch)
    run(federation(seed=None))
    run(federation())
    assert len(set(keys)) == len(keys) == 2 * 3 * 3
    digest = secrets.digest
    assert digest(KEYS[0], "test noise", 0, 0) in keys
    training = {digest(KEYS[k], purpose, r, 0) for k in range(3) for purpose in secrets.PURPOSES for r in range(9)}
    assert not training & set(keys)


def test_a_workdir_that_is_put_back_draws_no_noise_twice(federation, tmp_path, monkeypatch):
    """A disk's snapshot, say: the same rounds and attempts, under another history of the ledger."""
    keys = noise_keys(monkeypatch)
    next(federation(seed=None).fit(small.shards(), tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "snapshot")
    run(federation(seed=None), workdir=tmp_path / "run")
    run(federation(seed=None), workdir=tmp_path / "snapshot")
    assert len(set(keys)) == len(keys) == 3 * (1 + 2 + 2)


@pytest.mark.parametrize("trust", ["local", "distributed"])
def test_the_noise_of_the_honest_is_what_the_budget_asks_for(federation, monkeypatch, trust):
    """In mode `local` each client's own is enough; in mode `distributed` that of any two of three, the third being curious."""
    multipliers = []
    inner = unit_scores.noisy
    monkeypatch.setattr(
        unit_scores, "noisy", lambda summed, noise, *more: (multipliers.append(noise), inner(summed, noise, *more))[1]
    )
    made = federation(trust=trust)
    next(run_lazily(made))
    needed = held_out.noise_multiplier(made.config)
    honest = 1 if trust == "local" else 2
    assert multipliers == pytest.approx([needed / math.sqrt(honest)] * 3)
    assert accounting.full_epsilon([needed] * 3, 1e-3) <= 8.0


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


def test_other_records_among_those_kept_back_are_refused_on_resume(federation, tmp_path):
    made = federation()
    next(made.fit(small.shards(), tmp_path / "run"))
    other = changed(made, lambda client: kept(made).parts[client].places[:1])
    with pytest.raises(InputError, match="the records are not those"):
        run(federation(), other, tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"private_test": 0.5}, "`private_test`"), ({"private_test_epsilon": 1.0}, "`private_test_epsilon`"),
     ({"eval_every": 1}, "`eval_every`"), ({"clip_norm": 2.0}, "`clip_norm`")],
)  # fmt: skip
def test_what_decides_the_split_or_its_noise_is_fixed_once_an_evaluation_is_charged(
    federation, tmp_path, fields, words
):
    """Before the first round too: its evaluation has been paid for."""
    next(federation(seed=None).fit(small.shards(), tmp_path / "run"))
    assert not entries(tmp_path / "run").begun
    with pytest.raises(InputError, match=words):
        run(federation(seed=None, **fields), workdir=tmp_path / "run")


def test_a_start_that_ended_before_the_first_round_is_gone_on_with(federation, tmp_path):
    """Its evaluation is paid for, and so is not made again; and config.json, by which it was charged, may not change or go."""
    next(federation(seed=None).fit(small.shards(), tmp_path / "run"))
    path = tmp_path / "run" / "config.json"
    config = path.read_text()
    for damage, words in (
        (path.unlink, "config.json is gone"),
        (
            lambda: path.write_text(config.replace('"evaluations": 3', '"evaluations": 4')),
            "not the one that the ledger",
        ),
    ):
        damage()
        with pytest.raises(InputError, match=words):
            run(federation(seed=None), workdir=tmp_path / "run")
        path.write_text(config)
    run(federation(seed=None), workdir=tmp_path / "run")
    assert [(entry["round"], entry["attempt"]) for entry in entries(tmp_path / "run").evaluated] == [
        (0, 0),
        (2, 0),
        (4, 0),
    ]


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
