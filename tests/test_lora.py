"""LoRA pairs: what they add, what their leaves are, and how they move in and out of the base."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import lora, losses, models
from dplora_jax.models.bert import Bert
from tests.conftest import GOLDEN

SHAPES = {
    "q and v": lora.LoraConfig(4, 8, ("q", "v")),
    "all-linear": lora.LoraConfig(2, 3, ("all-linear",)),
    "last layer": lora.LoraConfig(4, 8, ("q", "down"), last_layers=1),
    "head alone": lora.LoraConfig(4, 8, ()),
}
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


pytestmark = pytest.mark.usefixtures("quick_compile")
apply = jax.jit(Bert.apply, static_argnums=0)


@pytest.fixture(scope="module")
def classifier():
    return *models.from_pretrained(GOLDEN / "bert_tiny_classifier"), read(GOLDEN / "bert_tiny_classifier")


@pytest.fixture(scope="module")
def mlm():
    return *models.from_pretrained(GOLDEN / "bert_tiny_mlm"), read(GOLDEN / "bert_tiny_mlm")


def read(directory):
    with np.load(directory / "golden.npz") as file:
        return {name: jnp.asarray(file[name], jnp.int32) for name in ("input_ids", "attention_mask")}


def trained(model, params, config):
    """An adapter all of whose leaves are random."""
    adapter = lora.init(jax.random.key(0), model, params, config)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32), adapter)


@shapes
def test_a_fresh_adapter_changes_nothing(classifier, config):
    model, params, batch = classifier
    adapter = lora.init(jax.random.key(0), model, params, config)
    np.testing.assert_allclose(apply(model, params, batch, adapter), apply(model, params, batch), rtol=1e-5, atol=1e-6)


def test_a_fresh_adapter_has_random_a_and_zero_b(classifier):
    model, params, _ = classifier
    pairs = lora.init(jax.random.key(0), model, params, SHAPES["all-linear"])["layers"]
    for name, pair in pairs.items():
        bound = model.targets[name].shape[0] ** -0.5  # PEFT's Kaiming draw with a = sqrt(5)
        assert not pair.b.any()
        assert 0.9 * bound < jnp.abs(pair.a).max() <= bound
    assert not np.array_equal(pairs["query"].a, pairs["key"].a)
    assert not np.array_equal(pairs["query"].a[0], pairs["query"].a[1])


@shapes
def test_merging_equals_adapting(classifier, config):
    model, params, batch = classifier
    adapter = trained(model, params, config)
    adapted = apply(model, params, batch, adapter)
    merged = apply(model, lora.merge(model, params, adapter, config), batch)
    np.testing.assert_allclose(merged, adapted, atol=2e-6)
    assert np.abs(adapted - apply(model, params, batch)).max() > 1e-3


def test_merging_a_language_model_equals_adapting_it(mlm):
    model, params, batch = mlm
    adapter = trained(model, params, SHAPES["all-linear"])
    assert "head" not in adapter
    merged = lora.merge(model, params, adapter, SHAPES["all-linear"])
    np.testing.assert_allclose(apply(model, merged, batch), apply(model, params, batch, adapter), atol=1e-5)


def test_merging_adds_alpha_over_rank_b_a(classifier):
    model, params, _ = classifier
    config = lora.LoraConfig(2, 6, ("q",), last_layers=2)
    pair = trained(model, params, config)["layers"]["query"]
    merged = lora.merge(model, params, {"layers": {"query": pair}}, config)
    change = merged["layers"]["query"]["kernel"] - params["layers"]["query"]["kernel"]
    assert not change[0].any()
    for layer in range(2):
        expected = 3 * np.asarray(pair.b[layer], np.float64) @ np.asarray(pair.a[layer], np.float64)
        np.testing.assert_allclose(change[1 + layer].T, expected, atol=1e-6)


@shapes
def test_leaves_are_exactly_a_b_and_the_head(classifier, config):
    model, params, _ = classifier
    adapter = lora.init(jax.random.key(0), model, params, config)
    depth = config.last_layers or 3
    expected = [params["head"]["kernel"].shape, (3,)]
    for inputs, outputs in lora.resolve_targets(model, config.targets).values():
        expected += [(depth, config.rank, inputs), (depth, outputs, config.rank)]
    if config.targets == ("all-linear",):  # the pooler stands above all layers
        expected[-2:] = [(1, *expected[-2][1:]), (1, *expected[-1][1:])]
    assert sorted(leaf.shape for leaf in jax.tree.leaves(adapter)) == sorted(expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {np.dtype("float32")}
    assert lora.count(adapter) == sum(int(np.prod(shape)) for shape in expected)


def test_the_scale_is_no_leaf_and_survives_tree_maps(classifier):
    model, params, _ = classifier
    adapter = lora.init(jax.random.key(0), model, params, lora.LoraConfig(4, 6))
    doubled = jax.tree.map(lambda x: 2 * x, adapter)
    assert {pair.scale for pair in doubled["layers"].values()} == {1.5}


def test_count_of_known_shapes(classifier):
    model, params, _ = classifier
    adapter = lora.init(jax.random.key(0), model, params, lora.LoraConfig(4, 8))
    assert lora.count(adapter) == 3 * 2 * 4 * (48 + 48) + 48 * 3 + 3


@shapes
def test_freezing_a_keeps_the_logits_and_leaves_only_b_and_the_head(classifier, config):
    model, params, batch = classifier
    adapter = trained(model, params, config)
    frozen_params, bare = lora.freeze_a(params, adapter)
    restored = lora.with_frozen(frozen_params, bare)
    assert jax.tree.structure(restored) == jax.tree.structure(adapter)
    jax.tree.map(np.testing.assert_array_equal, restored, adapter)
    np.testing.assert_array_equal(apply(model, frozen_params, batch, bare), apply(model, params, batch, adapter))
    matrices = len(lora.resolve_targets(model, config.targets))
    assert len(jax.tree.leaves(bare)) == 2 + matrices
    assert len(jax.tree.leaves(frozen_params)) == len(jax.tree.leaves(params)) + matrices
    merged = lora.merge(model, frozen_params, bare, config)
    jax.tree.map(np.testing.assert_array_equal, merged, lora.merge(model, params, adapter, config))


def test_the_gradient_of_a_frozen_a_does_not_exist(classifier):
    model, params, batch = classifier
    params, bare = lora.freeze_a(params, trained(model, params, SHAPES["q and v"]))
    loss = losses.classification(model, params)
    batch = batch | {"labels": jnp.array([0, 1, 2])}
    grad = jax.jit(jax.grad(lambda adapter: loss(adapter, batch).sum()))(bare)
    assert jax.tree.structure(grad) == jax.tree.structure(bare)
    assert all(pair.a is None and pair.b.any() for pair in grad["layers"].values())


def test_freezing_a_on_a_head_alone_does_nothing(classifier):
    model, params, _ = classifier
    adapter = lora.init(jax.random.key(0), model, params, SHAPES["head alone"])
    same_params, same = lora.freeze_a(params, adapter)
    assert same_params is params
    assert same is adapter


def test_a_frozen_a_stays_at_its_draw_while_b_decides_the_delta(classifier):
    model, params, batch = classifier
    adapter = trained(model, params, SHAPES["q and v"])
    frozen, bare = lora.freeze_a(params, adapter)
    off = jax.tree.map(jnp.zeros_like, bare["layers"])
    np.testing.assert_array_equal(
        apply(model, frozen, batch, {"layers": off, "head": params["head"]}), apply(model, params, batch)
    )


@pytest.mark.parametrize(
    ("names", "resolved"),
    [
        (("q", "v"), {"query", "value"}),
        (("query",), {"query"}),
        (("q", "query"), {"query"}),
        (("k", "o"), {"key", "output"}),
        (("up", "down"), {"up", "down"}),
        (("all-linear",), {"query", "key", "value", "output", "up", "down", "pooler"}),
        (("pooler",), {"pooler"}),
        ((), set()),
    ],
)
def test_targets_resolve_to_the_familys_matrices(classifier, names, resolved):
    assert set(lora.resolve_targets(classifier[0], names)) == resolved


def test_an_unknown_target_is_refused_with_the_known_ones(classifier):
    model, params, _ = classifier
    with pytest.raises(ValueError, match=r"unknown target 'q_proj'.*\bq\b.*\bv\b.*all-linear"):
        lora.init(jax.random.key(0), model, params, lora.LoraConfig(4, 8, ("q_proj",)))


def test_a_rank_above_the_matrix_warns_and_one_within_does_not(classifier):
    model, params, _ = classifier
    with pytest.warns(UserWarning, match="rank 49 exceeds query's own 48"):
        lora.init(jax.random.key(0), model, params, lora.LoraConfig(49, 8, ("q",)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.init(jax.random.key(0), model, params, lora.LoraConfig(48, 8, ("q",)))


@pytest.mark.parametrize("last_layers", [0, 4, -1])
def test_last_layers_outside_the_depth_are_refused(classifier, last_layers):
    model, params, _ = classifier
    with pytest.raises(ValueError, match=r"last_layers must lie in 1\.\.3"):
        lora.init(jax.random.key(0), model, params, lora.LoraConfig(4, 8, ("q",), last_layers))


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="rank must be 1 or more"):
        lora.LoraConfig(0, 8)


def test_nothing_to_train_is_refused(mlm):
    model, params, _ = mlm
    with pytest.raises(ValueError, match="nothing to train"):
        lora.init(jax.random.key(0), model, params, lora.LoraConfig(4, 8, ()))
