"""Adapters of any layers, ranks and scales, of the pooler and of the bare model do to a model what PEFT's formula says."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dplora_jax import lora, losses, models, peft
from dplora_jax.errors import InputError
from dplora_jax.models.bert import Bert
from dplora_jax.privacy import clipping
from tests.conftest import GOLDEN, mostly_slow

pytestmark = pytest.mark.usefixtures("quick_compile")
BATCH = {"input_ids": np.arange(3, 23).reshape(2, 10), "attention_mask": np.ones((2, 10), np.int32)}
QUERY, DOWN, POOLER = (
    "bert.encoder.layer.{}.attention.self.query",
    "bert.encoder.layer.{}.output.dense",
    "bert.pooler.dense",
)
SHAPES = {QUERY: (48, 48), DOWN: (96, 48), POOLER: (48, 48)}
apply = jax.jit(Bert.apply, static_argnums=0)


@pytest.fixture(scope="module")
def classifier():
    return models.from_pretrained(GOLDEN / "bert_tiny_classifier")


def written(directory, ranks, bare=False, **options):
    """An adapter directory with random matrices: `ranks` {(module, layer): rank} -> {(module, layer): (A, B)}."""
    rng, matrices, tensors = np.random.default_rng(0), {}, {}
    for (module, layer), rank in ranks.items():
        inputs, outputs = SHAPES[module]
        a, b = (rng.normal(0, 0.2, shape).astype(np.float32) for shape in ((rank, inputs), (outputs, rank)))
        matrices[module, layer] = a, b
        name = module.format(layer).removeprefix("bert." if bare else "")
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    document = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["query", "output.dense", "pooler.dense"],
    }
    (directory / "adapter_config.json").write_text(json.dumps(document | options))
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    return matrices


def changed(params, matrices, scales):
    """`params` with scale B A added to the kernels, by hand."""
    layers, pooler = params["layers"], params["pooler"]
    for (module, layer), (a, b) in matrices.items():
        delta = scales.get((module, layer), 2.0) * (b.astype(np.float64) @ a).T
        if module == POOLER:
            pooler = pooler | {"kernel": pooler["kernel"] + delta}
            continue
        name = "query" if module == QUERY else "down"
        kernel = layers[name]["kernel"].at[layer].add(delta)
        layers = layers | {name: layers[name] | {"kernel": kernel}}
    return params | {"layers": layers, "pooler": pooler}


ALL = {(QUERY, i): 4 for i in range(3)}
FIRST = "1.attention.self.query"
ENDS = {(QUERY, 0): 4, (QUERY, 2): 4}
CASES = {  # name: (ranks, options, the scales that differ from 2)
    "rank-stabilised": (ALL, {"use_rslora": True}, dict.fromkeys(ALL, 4.0)),
    "an alpha by kind": (ALL | {(DOWN, 1): 4}, {"alpha_pattern": {"query": 32}}, dict.fromkeys(ALL, 8.0)),
    "an alpha by layer": (ALL, {"alpha_pattern": {FIRST: 24}}, {(QUERY, 1): 6.0}),
    "a rank by layer": (ALL | {(QUERY, 1): 2}, {"rank_pattern": {FIRST: 2}}, {(QUERY, 1): 4.0}),
    "a larger rank by kind": (ALL | {(DOWN, 2): 6}, {"rank_pattern": {"output.dense": 6}}, {(DOWN, 2): 8 / 6}),
    "the first and last layer": (ENDS, {"layers_to_transform": [0, 2]}, {}),
    "other layers of another kind": ({(QUERY, 1): 4, (DOWN, 2): 4}, {}, {}),
    "the pooler too": (ALL | {(POOLER, 0): 4}, {}, {}),
    "the pooler alone": ({(POOLER, 0): 4}, {}, {}),
    "patterns of other modules": (ALL, {"rank_pattern": {"key": 2}, "alpha_pattern": {"no": 1}}, {}),
}
cases = pytest.mark.parametrize(("ranks", "options", "scales"), CASES.values(), ids=CASES)


@cases
def test_it_adds_what_pefts_formula_says_and_keeps_it_through_files_and_merging(
    classifier, tmp_path, ranks, options, scales
):
    model, params = classifier
    expected = apply(model, changed(params, written(tmp_path, ranks, **options), scales), BATCH)
    adapter, config = peft.load(tmp_path, model, params)
    np.testing.assert_allclose(apply(model, params, BATCH, adapter), expected, atol=2e-5)
    np.testing.assert_allclose(apply(model, lora.merge(model, params, adapter, config), BATCH), expected, atol=2e-5)
    again = tmp_path / "again"
    peft.save(again, model, adapter, config)
    assert not json.loads((again / "adapter_config.json").read_text())["use_rslora"]
    second, read = peft.load(again, model, params)
    assert (read.rank, read.targets, read.last_layers) == (config.rank, config.targets, config.last_layers)
    np.testing.assert_allclose(apply(model, params, BATCH, second), expected, atol=2e-5)
    assert np.abs(apply(model, params, BATCH) - expected).max() > 1e-3


@cases
def test_its_tree_is_one_of_lora_init(classifier, tmp_path, ranks, options, scales):
    model, params = classifier
    written(tmp_path, ranks, **options)
    adapter, config = peft.load(tmp_path, model, params)
    fresh = lora.init(jax.random.key(0), model, params, config)
    assert jax.tree.map(jnp.shape, adapter["layers"]).keys() == fresh["layers"].keys()
    for name, pair in adapter["layers"].items():
        assert (pair.a.shape, pair.b.shape) == (fresh["layers"][name].a.shape, fresh["layers"][name].b.shape)


def test_what_the_file_leaves_out_begins_as_a_fresh_adapter(classifier, tmp_path):
    model, params = classifier
    written(tmp_path, {(QUERY, 1): 2, (DOWN, 0): 4}, rank_pattern={"query": 2})
    adapter, config = peft.load(tmp_path, model, params)
    fresh = lora.init(jax.random.key(0), model, params, config)["layers"]["query"]
    pair = adapter["layers"]["query"]
    np.testing.assert_array_equal(pair.a[0], fresh.a[0])
    np.testing.assert_array_equal(pair.a[1, 2:], fresh.a[1, 2:])  # a component that B lets grow
    assert np.all(np.any(np.asarray(pair.a) != 0, -1))
    assert not np.any(pair.b[jnp.array([0, 2])])
    assert not np.any(pair.b[1, :, 2:])


def test_an_adapter_of_the_bare_model_lacks_the_first_part_of_its_names(classifier, tmp_path):
    model, params = classifier
    ranks = ALL | {(POOLER, 0): 4}
    matrices = written(tmp_path, ranks, bare=True, task_type="FEATURE_EXTRACTION", layers_to_transform=None)
    adapter, _ = peft.load(tmp_path, model, params)
    expected = apply(model, changed(params, matrices, {}), BATCH)
    np.testing.assert_allclose(apply(model, params, BATCH, adapter), expected, atol=2e-5)


def test_a_mean_pooled_model_needs_no_pooler(tmp_path):
    model = Bert(models.from_pretrained(GOLDEN / "bert_tiny_classifier")[0].config.__class__(
        99, 48, 3, 4, 96, 64, 2, num_labels=3, pooling="mean"
    ))  # fmt: skip
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(model.init, jax.random.key(0)))
    written(tmp_path, ALL | {(POOLER, 0): 4})
    assert set(peft.load(tmp_path, model, params)[0]["layers"]) == {"query"}


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["key"]}, {"exclude_modules": ["query"]}, {"layers_to_transform": [0, 1]}, {"target_modules": "query"}],
)  # fmt: skip
def test_matrices_that_the_config_leaves_out_are_refused(classifier, tmp_path, options):
    written(tmp_path, ALL, **options)
    with pytest.raises(InputError, match=r"attention\.self\.query, which target_modules"):
        peft.load(tmp_path, *classifier)


def test_a_pickled_adapter_is_refused_with_the_way_out(classifier, tmp_path):
    written(tmp_path, ALL)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin is a pickle") as caught:
        peft.load(tmp_path, *classifier)
    assert "weights_only=True" in str(caught.value)
    assert pathlib.Path(tmp_path, "adapter_model.bin").exists()


@pytest.mark.parametrize("form", mostly_slow(["ghost"], ["vmap", "broadcast", "ghost", "auto"]))
def test_the_pooler_is_clipped_as_every_other_matrix(classifier, form):
    model, params = classifier
    tree = lora.init(jax.random.key(0), model, params, lora.LoraConfig(2, 4, ("query", "pooler"), last_layers=1))
    tree = jax.tree.map(lambda leaf: leaf + 0.1, tree)
    batch = BATCH | {"labels": np.array([0, 2])}
    loss = losses.classification(model, params)
    total, norms, _ = jax.jit(lambda tree: clipping.clipped_grad_sum(loss, tree, batch, 0.5, form=form))(tree)
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(2)]
    gradient = jax.jit(jax.grad(lambda tree, row: loss(tree, row).sum()))
    each = [gradient(tree, row) for row in rows]
    sizes = [np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(tree))) for tree in each]
    np.testing.assert_allclose(norms, sizes, rtol=1e-3)
    scaled = [
        jax.tree.map(lambda leaf, size=size: leaf * min(1, 0.5 / size), own)
        for own, size in zip(each, sizes, strict=True)
    ]
    expected = jax.tree.map(jnp.add, *scaled)
    jax.tree.map(lambda left, right: np.testing.assert_allclose(left, right, atol=2e-4), total, expected)
    assert np.any(each[0]["layers"]["pooler"].b)
