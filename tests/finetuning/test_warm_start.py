"""A start from public text: what it trains, what it depends on, and that it costs nothing; mistakes are one sentence each."""

import json
import string
import warnings

import jax
import numpy as np
import optax
import pytest

from dplora_jax import losses
from dplora_jax.config import RunConfig, from_flat, to_flat
from dplora_jax.errors import InputError, InputWarning
from dplora_jax.federation import dispatch, mesh
from dplora_jax.federation.federation import Federation
from dplora_jax.finetuning import setup, warm_start
from experiments import cli, run
from experiments.sweep import _trained
from tests import letters
from tests.conftest import mostly_slow
from tests.experiments.small_runs import adapter_of, crash_before, fit, lines_of

pytestmark = pytest.mark.usefixtures("quick_compile")
NAMES = {"good": "bullish", "bad": "bearish"}


@pytest.fixture(scope="module")
def public(tmp_path_factory, finance_table):
    """A file of 23 public records, whose labels have other names than the private table's."""
    rows = [line.split(",") for line in (finance_table / "train.csv").read_text().splitlines()[1:24]]
    path = tmp_path_factory.mktemp("public") / "news.csv"
    path.write_text("text,label\n" + "".join(f"today {text},{NAMES[label]}\n" for text, label, _ in rows))
    return path


@pytest.fixture
def cold(tiny_bert, finance_table, tmp_path):
    return [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=2", "--rounds=2", "--expected_batch_size=8", "--rank=2", "--last_layers=1",
        "--epsilon=8", "--delta=1e-3", "--client_lr=0.1", "--head_lr=0.1", "--eval_every=1", f"--workdir={tmp_path / 'run'}",
    ]  # fmt: skip


@pytest.fixture
def warm(cold, public):
    return [
        *cold, f"--public_data={public}", "--public_labels=bullish:good,bearish:bad", "--public_lr=0.02",
        "--public_batch_size=8",
    ]  # fmt: skip


def started(arguments):
    """(the FineTuning of a command line with everything on the mesh, its adapter before round 1)."""
    job = setup.prepare(cli.parse(arguments, lambda _: None))
    prepared = job.federation.prepare(job.shards)
    return job, job.start(prepared) if job.start else mesh.fetch(prepared.adapter)


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def mean_loss(job, adapter, table):
    federation, prepared = job.federation, job.federation.prepared
    loss = losses.classification(federation.model, mesh.fetch(prepared.params))
    return float(loss(adapter, table).mean())


WAYS = {
    "plain": [], "freeze_a": ["--freeze_a"], "head_only": ["--head_only"], "feature_norm": ["--feature_norm=4"],
    "uncached": ["--cache_frozen=false"], "core": ["--core"],
}  # fmt: skip


@pytest.mark.parametrize("way", mostly_slow(["freeze_a"], WAYS))
def test_the_loss_on_public_records_falls_in_what_the_federation_trains(warm, way):
    job, start = started([*warm, *WAYS[way], "--public_epochs=8"])
    fresh = job.federation.prepared.adapter
    assert jax.tree.structure(start) == jax.tree.structure(fresh)
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(fresh), strict=True))
    table = job.start.args[1].train(job.start.args[2])
    assert mean_loss(job, start, table) < mean_loss(job, fresh, table) - 0.05


COLUMNS = {
    "answers": ["--prompt_column=text", "--answer_column=other"],
    "text": ["--text_column=other"],
    "label words": ["--text_column=text", "--label_column=label", "--labels=good,bad"],
}


@pytest.mark.parametrize("kind", mostly_slow(["answers"], COLUMNS))
def test_a_language_model_starts_from_answers_text_and_label_words_alike(tmp_path, kind):
    model = letters.write(tmp_path / "model", string.ascii_letters + " :?\n")
    for name in ("train", "test", "public"):
        rows = [f"{name} {'st'[i % 2] * 6},{name} {'xyz'[i % 3] * 9},{('good', 'bad')[i % 2]}" for i in range(12)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,other,label", *rows]))
    job, start = started([
        f"--model={model}", "--dataset=csv", f"--data_dir={tmp_path}", *COLUMNS[kind], "--max_length=40", "--clients=2",
        "--rounds=1", "--expected_batch_size=4", "--rank=2", "--epsilon=8", "--delta=1e-3",
        f"--public_data={tmp_path / 'public.csv'}", "--public_lr=0.05", "--public_batch_size=6", "--public_epochs=10",
    ])  # fmt: skip
    prepared, objective, public = job.federation.prepared, *job.start.args[1:3]
    loss = objective.loss(job.federation.model, mesh.fetch(prepared.params))
    before, after = (float(loss(one, objective.train(public)).mean()) for one in (prepared.adapter, start))
    assert after < before - 0.02


def test_two_steps_are_adams(warm):
    """Against optax by hand, from the first layer on: two steps of an epoch whose last has fewer rows than a batch."""
    job, start = started([*warm, "--public_epochs=1", "--public_batch_size=16"])
    table = job.start.args[1].train(job.start.args[2])
    prepared, adapter = job.federation.prepared, job.federation.prepared.adapter
    loss = losses.classification(job.federation.model, mesh.fetch(prepared.params))
    order = np.random.default_rng((0, warm_start.ORDER, 0)).permutation(23)
    optimizer = optax.adam(lambda step: 0.02 * (1 - step / 2))
    state = optimizer.init(adapter)
    for chosen in (order[:16], order[16:]):
        rows = {name: array[chosen] for name, array in table.items()}
        gradient = jax.grad(lambda adapter, rows: loss(adapter, rows).mean())(adapter, rows)
        updates, state = optimizer.update(gradient, state)
        adapter = optax.apply_updates(adapter, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), start, mesh.fetch(adapter))


def test_a_batch_has_each_row_once_a_pass_and_the_rest_weighs_nothing():
    rows, weights = zip(*warm_start.batches(23, 8, 10, 0), strict=True)
    assert {len(one) for one in rows} == {10}
    taken = np.concatenate([one[weight > 0] for one, weight in zip(rows, weights, strict=True)])
    np.testing.assert_array_equal(np.sort(taken), np.arange(23))
    assert [int(weight.sum()) for weight in weights] == [8, 8, 7]
    assert next(warm_start.batches(23, 8, 10, 0))[0].tolist() == rows[0].tolist()


def test_private_rows_have_no_influence_on_it(warm, finance_table, tmp_path):
    _, start = started(warm)
    flip = {"good": "bad", "bad": "good"}
    rows = [line.split(",") for line in (finance_table / "train.csv").read_text().splitlines()]
    (tmp_path / "train.csv").write_text(
        "\n".join(f"{text} again,{flip.get(label, label)},{bank}" for text, label, bank in rows).replace(
            "text again", "text"
        )
    )
    (tmp_path / "test.csv").write_text((finance_table / "test.csv").read_text())
    _, other = started([*warm, f"--data_dir={tmp_path}"])
    assert_equal(start, other)


def test_it_follows_the_public_records_and_their_labels(warm, public, tmp_path):
    _, start = started(warm)
    (tmp_path / "same.csv").write_text(public.read_text().replace("bullish", "good").replace("bearish", "bad"))
    _, same = started([*warm, f"--public_data={tmp_path / 'same.csv'}", "--public_labels="])
    assert_equal(start, same)
    _, other = started([*warm, "--public_labels=bullish:bad,bearish:good"])
    assert np.any(start["head"]["kernel"] != other["head"]["kernel"])


def test_without_epochs_nothing_changes(cold, public):
    job, fresh = started(cold)
    none, same = started([*cold, f"--public_data={public}", "--public_epochs=0"])
    assert none.start is None
    assert_equal(fresh, same)
    assert not any("public records" in line for line in none.federation.describe(none.describe)["method"])
    assert cli.parse(cold, lambda _: None) == from_flat(
        {name: value for name, value in to_flat(job.federation.config).items() if not name.startswith("public_")},
        RunConfig,
    )


def test_it_costs_no_epsilon_and_says_what_was_done(cold, warm, tmp_path):
    fit([*cold, f"--workdir={tmp_path / 'cold'}"])
    assert run.main(warm) == 0
    one, other = ([line["epsilon"] for line in lines_of(tmp_path / name / "metrics.jsonl")] for name in ("cold", "run"))
    assert one == other
    charged = [
        [
            (e["rounds"], e["clients"])
            for e in lines_of(tmp_path / name / "privacy_ledger.jsonl")
            if e["entry"] == "begin"
        ]
        for name in ("cold", "run")
    ]
    assert charged[0] == charged[1]
    line = "trained first on 23 public records of news.csv"
    assert any(
        line in said for said in json.loads((tmp_path / "run" / "config.json").read_text())["federation"]["method"]
    )
    assert line in (tmp_path / "run" / "report.html").read_text()
    assert "before round 1" in (tmp_path / "run" / "report.html").read_text()


PLACES = {"charge": dispatch, "execute": dispatch, "_finish": Federation}


@pytest.mark.parametrize("place", mostly_slow(["execute"], PLACES))
def test_a_run_that_was_stopped_goes_on_from_its_own_start(warm, tmp_path, public, place, monkeypatch):
    """Wherever it was stopped; once it was charged, the start is what checkpoint 0 has, and it is trained no more."""
    whole = [*warm, "--seed=1"]
    fit([*whole, f"--workdir={tmp_path / 'whole'}"])
    with pytest.MonkeyPatch.context() as patch:
        crash_before(patch, PLACES[place], place)
        with pytest.raises(KeyboardInterrupt):
            fit(whole)
    if place != "charge":
        monkeypatch.setattr(warm_start, "_passes", None)
    fit(whole)
    one, other = (adapter_of(tmp_path / name) for name in ("whole", "run"))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_the_start_is_durable_before_anything_is_charged(warm, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        crash_before(patch, dispatch, "charge")
        with pytest.raises(KeyboardInterrupt):
            fit(warm)
    assert (tmp_path / "run" / "checkpoints" / "0").exists()
    assert not (tmp_path / "run" / "privacy_ledger.jsonl").exists()


def test_a_sweep_trains_it_once_for_cells_that_share_it(warm, monkeypatch):
    counted, passes = [], warm_start._passes
    monkeypatch.setattr(warm_start, "_passes", lambda *given: counted.append(1) or passes(*given))
    memo, metrics = {}, []
    for more in ([], ["--epsilon=2"], ["--public_lr=0.01"], ["--alpha=5"]):
        config = cli.parse([*warm, "--seed=1", *more], lambda _: None)
        metrics.append(_trained(config, "run", memo, {})[0])
    assert len(counted) == 3


def test_public_records_in_the_public_test_set_are_counted(warm, public, finance_table, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        setup.prepare(cli.parse(warm, lambda _: None))
    tests = (finance_table / "test.csv").read_text().splitlines()[1:4]
    path = tmp_path / "more.csv"
    path.write_text(public.read_text() + "".join(f"{line.split(',')[0]},bullish\n" for line in tests))
    with pytest.warns(InputWarning, match=r"holds \d+ of the 30 records of the public test set"):
        setup.prepare(cli.parse([*warm, f"--public_data={path}"], lambda _: None))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--public_data=nowhere.csv"], "nowhere.csv"),
        (["--public_data=nowhere"], "no file, and no task"),
        (["--public_data=medquad"], "prompts with answers"),
        (["--public_data=piqa"], "choices"),
        (["--public_data={empty}"], "has no rows"),
        (["--public_data={private}", "--public_labels="], "is refused as public records to train on"),
        (["--public_labels=bullish:good"], "has the labels bearish, and the run's are bad, good"),
        (["--public_labels=bullish"], "--public_labels=bullish is malformed"),
        (["--public_labels=bullish:good,bullish:bad"], "malformed"),
        (["--public_data="], "--public_labels names labels of --public_data"),
        (["--public_epochs=-1"], "--public_epochs"),
        (["--public_lr=0"], "--public_lr"),
        (["--public_batch_size=0"], "--public_batch_size"),
        (["--public_lr=1e38"], "--public_lr=1e\\+38 led to numbers that are not finite"),
    ],
)
def test_a_mistake_is_one_sentence(warm, finance_table, tmp_path, more, words, capsys):
    (tmp_path / "empty.csv").write_text("text,label\n")
    given = {"empty": tmp_path / "empty.csv", "private": finance_table / "train.csv"}
    assert run.main([*warm, *(word.format(**given) for word in more)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert words.replace("\\", "") in said[-1]


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (lambda prepared: {"head": prepared.adapter["head"]}, "another form"),
        (lambda prepared: jax.tree.map(lambda x: x + np.nan, prepared.adapter), "not finite"),
    ],
)
def test_a_start_that_is_no_adapter_of_this_federation_is_refused(warm, start, words):
    job = setup.prepare(cli.parse(warm, lambda _: None))
    with pytest.warns(InputWarning, match="no workdir"), pytest.raises(InputError, match=words):
        list(job.federation.fit(job.shards, start=start))
