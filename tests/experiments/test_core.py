"""A run with --core: its bases are of public text alone, and what is released is an adapter like any other."""

import shutil

import jax
import numpy as np
import pytest

from dplora_jax import lora, losses, models, peft
from dplora_jax.errors import InputError
from dplora_jax.federation import mesh, program
from dplora_jax.finetuning import setup
from dplora_jax.models import public_bases
from dplora_jax.privacy.clipping import clipped_grad_sum
from experiments import cli
from experiments.plan import program as plan
from tests.conftest import GOLDEN, write_tokenizer
from tests.experiments.public_measures import arguments, labelled_by_words, measured, measured_anew, relabelled
from tests.experiments.small_runs import fit

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def command(tiny_bert, finance_table, tmp_path):
    return [*arguments(tiny_bert, finance_table, tmp_path), "--core"]


def cored():
    """(model, params, adapter with a random core between a random A and B, batch of three rows)."""
    model, params = models.from_pretrained(GOLDEN / "bert_tiny_classifier")
    config, rng = lora.LoraConfig(3, 6, ("q", "down"), last_layers=1), np.random.default_rng(0)
    normal = lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32)  # noqa: E731
    fresh = lora.init(jax.random.key(0), model, params, config)
    bases = {name: (normal(pair.a), normal(pair.b)) for name, pair in fresh["layers"].items()}
    params, adapter = lora.between(params, fresh, bases)
    with np.load(GOLDEN / "bert_tiny_classifier" / "golden.npz") as file:
        batch = {name: file[name].astype(np.int32) for name in ("input_ids", "attention_mask")}
    return model, params, adapter, batch | {"labels": np.array([0, 1, 2], np.int32)}


def moved(adapter):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.5, x.shape).astype(np.float32), adapter)


def test_a_core_of_zeros_changes_nothing_and_is_all_that_is_trained():
    model, params, adapter, batch = cored()
    assert {leaf.shape for leaf in jax.tree.leaves(adapter["layers"])} == {(1, 3, 3)}
    run = jax.jit(model.apply)
    np.testing.assert_array_equal(run(params, batch, adapter), run(params, batch, {"head": adapter["head"]}))


def test_multiplied_into_b_a_core_says_the_same_merged_or_not():
    model, params, adapter, batch = cored()
    adapter = moved(adapter)
    expected = jax.jit(model.apply)(params, batch, adapter)
    plain = lora.without_cores(lora.with_frozen(params, adapter))
    assert all(pair.core is None for pair in plain["layers"].values())
    np.testing.assert_allclose(jax.jit(model.apply)(params, batch, plain), expected, atol=1e-4)
    merged = lora.merge(model, params, adapter, lora.LoraConfig(3, 6))
    np.testing.assert_allclose(jax.jit(model.apply)(merged, batch), expected, atol=1e-4)


def test_a_cores_gradient_is_the_slope_of_the_loss():
    model, params, adapter, batch = cored()
    of, adapter = losses.classification(model, params), moved(adapter)
    mean = jax.jit(lambda layers: of({**adapter, "layers": layers}, batch).mean())
    gradient = jax.grad(mean)(adapter["layers"])
    for name, pair in gradient.items():
        steepest = np.asarray(pair.core) / np.linalg.norm(pair.core)
        own = adapter["layers"][name]
        up, down = (adapter["layers"] | {name: own.replace(core=own.core + h * steepest)} for h in (0.01, -0.01))
        slope = float(mean(up) - mean(down)) / 0.02
        assert slope > 1e-2
        assert np.linalg.norm(pair.core) == pytest.approx(slope, rel=2e-2)


@pytest.mark.parametrize("form", ["broadcast", "ghost"])
def test_rows_are_clipped_alike_in_every_form(form):
    model, params, adapter, batch = cored()
    loss, adapter = losses.classification(model, params), moved(adapter)
    run = jax.jit(
        lambda form: clipped_grad_sum(loss, adapter, batch, 0.3, np.ones(3, np.float32), form), static_argnums=0
    )
    for found, expected in zip(jax.tree.leaves(run(form)), jax.tree.leaves(run("vmap")), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_the_released_adapter_is_one_of_lora_and_says_the_same(command, tiny_bert, tmp_path):
    federation = fit(command).federation
    model, base = models.from_pretrained(tiny_bert, num_labels=2)
    rows = {"input_ids": np.arange(40, dtype=np.int32).reshape(8, 5) % 20, "attention_mask": np.ones((8, 5), bool)}
    adapter, config = peft.load(tmp_path / "run" / "adapter", model, base)
    assert config.rank == 2
    prepared = federation.prepared
    within = prepared.model.prefix(base, rows, prepared.model.start)
    expected = prepared.model.apply(
        mesh.fetch(prepared.params), {**rows, "hidden": within}, mesh.fetch(federation._state.adapter)
    )
    assert np.abs(np.asarray(federation._state.adapter["layers"]["query"].core)).max() > 0
    np.testing.assert_allclose(model.apply(base, rows, adapter), expected, rtol=2e-3, atol=2e-3)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_a_resumed_run_keeps_the_bases_that_its_core_was_trained_between(command, finance_table, tmp_path):
    _, before, resumed, fresh = measured_anew(command, finance_table, tmp_path)
    np.testing.assert_array_equal(flat(resumed), flat(before))
    assert np.abs(flat(fresh) - flat(before)).max() > 1e-3


def test_bases_are_of_public_text_alone(command, finance_table, tmp_path):
    bases = lambda name, **changes: flat(measured(command, finance_table, tmp_path / name, **changes))  # noqa: E731
    plain, sales = bases("plain"), lambda rows: rows.replace("profit", "sales")
    np.testing.assert_array_equal(bases("train", train=sales), plain)
    np.testing.assert_array_equal(bases("labels", test=relabelled), plain)
    assert np.abs(bases("test", test=sales) - plain).max() > 1e-3


NO_NOISE = ["--epsilon=inf", "--rounds=60", "--client_lr=5", "--head_lr=3", "--eval_every=0", "--seed=1"]
SMALL_NOISE = "--trust=distributed --epsilon=none --noise_multiplier=0.1"


def gained(job):
    """By how much a client's loss is lower with the cores that a run has trained than with none, under the same head."""
    federation = job.federation
    loss = federation.loss(federation.model, mesh.fetch(federation.prepared.params))
    adapter = mesh.fetch(federation._state.adapter)
    none = adapter | {"layers": jax.tree.map(np.zeros_like, adapter["layers"])}
    before, after = (float(loss(one, job.shards[0]).mean()) for one in (none, adapter))
    return before - after


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--dtype=bfloat16", "--quantize=int8", SMALL_NOISE, "--clipping=adaptive"])
def test_a_core_learns_whatever_numbers_trust_and_clipping(command, more):
    assert gained(fit([*command, *NO_NOISE, *more.split()])) > 0.01


@pytest.mark.slow
def test_a_core_goes_through_rounds_with_hardened_noise(command):
    job = fit([*command, "--trust=distributed", "--noise=hardened"])
    cores = [np.asarray(pair.core) for pair in job.federation._state.adapter["layers"].values()]
    assert all(core.any() and np.isfinite(core).all() for core in cores)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["roberta", "distilbert", "modernbert"])
def test_a_core_of_encoders_whose_head_has_more_layers_learns(finance_table, tmp_path, name):
    shutil.copytree(GOLDEN / "families" / f"{name}_classifier", tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    with pytest.warns(UserWarning, match="other labels"):
        job = fit([*arguments(tmp_path / "model", finance_table, tmp_path), "--core", *NO_NOISE, "--client_lr=2"])
    assert gained(job) > 0.001


def test_a_language_model_that_says_labels_learns_by_a_core(finance_table, tmp_path):
    shutil.copytree(GOLDEN / "variants/llama_mqa", tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text(labelled_by_words((finance_table / name).read_text()))
    own = [f"--data_dir={tmp_path}", "--labels=rose,fell", "--max_length=12", "--targets=q,o", "--core"]
    job = fit(
        [*arguments(tmp_path / "model", finance_table, tmp_path), *own, *NO_NOISE, "--rounds=20", "--client_lr=1"]
    )
    assert gained(job) > 0.01


def test_a_sweep_measures_once_what_its_cells_share(command, monkeypatch):
    counted, bases = [], public_bases.bases
    monkeypatch.setattr(public_bases, "bases", lambda *given: counted.append(1) or bases(*given))
    memo = {}
    for more in ([], ["--epsilon=2"], ["--client_lr=1"], ["--rank=3"]):
        setup.prepare(cli.parse([*command, *more]), memo=memo)
    assert len(counted) == 2


A, B = np.ones((1, 2, 16)).tolist(), np.ones((1, 16, 2)).tolist()
BASES = {"query": {"a": A, "b": B}, "value": {"a": A, "b": B}}
CHANGES = {
    "nothing": None,
    "a number": 5,
    "no bases": {"bases": {}},
    "a matrix less": {"bases": {"query": BASES["query"]}},
    "no b": {"bases": BASES | {"value": {"a": A}}},
    "another size": {"bases": BASES | {"value": {"a": np.ones((1, 2, 15)).tolist(), "b": B}}},
    "no number": {"bases": BASES | {"value": {"a": [[["x"] * 16] * 2], "b": B}}},
    "one that is infinite": {"bases": BASES | {"value": {"a": [[[1e39] * 16] * 2], "b": B}}},
    "one that is huge": {"bases": BASES | {"value": {"a": [[[10**400] * 16] * 2], "b": B}}},
    "more than was asked for": {"bases": BASES, "bias": [0.0]},
}


def test_what_was_measured_before_is_taken(command):
    made = setup.prepare(cli.parse(command), {"federation": {"measured": {"bases": BASES}}}).federation
    np.testing.assert_array_equal(made.params["measured"]["bases"]["value"]["b"], B)


@pytest.mark.parametrize("what", CHANGES)
def test_what_another_party_says_was_measured_is_held_against_the_model(command, what):
    with pytest.raises(InputError, match="does not fit this model and these settings"):
        setup.prepare(cli.parse(command), {"federation": {"measured": CHANGES[what]}})


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--freeze_a"], "trains neither A nor B"),
        (["--aggregation=rolora"], "core=True cannot be used with --aggregation=rolora"),
        (["--ranks=1,2"], "--ranks cannot be used with"),
    ],
)
def test_what_a_core_does_not_go_with_is_one_sentence(command, more, sentence):
    with pytest.raises(InputError, match=sentence):
        cli.parse([*command, *more])


def test_without_bases_a_federation_is_refused():
    model, params = models.from_pretrained(GOLDEN / "bert_tiny_classifier")
    config = cli.parse(["--core", "--rank=2", "--epsilon=8"])
    with pytest.raises(InputError, match="needs an A and a B from public text"):
        program.adapter(config, model, params)


def test_a_plan_knows_the_cores_shapes_without_bases(tiny_bert):
    flags = [
        "--core",
        "--rank=2",
        "--targets=q,o",
        "--epsilon=8",
        "--clients=2",
        "--max_length=8",
        f"--model={tiny_bert}",
    ]
    made = plan.abstract(cli.parse(flags), jax.devices()[:1], [40, 40], "classification", 3)
    assert {leaf.shape for leaf in jax.tree.leaves(made.arguments[0].adapter["layers"])} == {(2, 2, 2)}
