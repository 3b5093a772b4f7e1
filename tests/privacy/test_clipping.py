"""Per-example clipping in each form, against a loop over examples; and what one row can do to the sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dplora_jax import lora, losses, models
from dplora_jax.models import layers
from dplora_jax.privacy.clipping import clipped_grad_sum
from tests.conftest import GOLDEN, mostly_slow

pytestmark = pytest.mark.usefixtures("quick_compile")
CLASSIFIER, MLM = "bert_tiny_classifier", "bert_tiny_mlm"
# Checkpoint, adapter, whether A is frozen, how many layers are unrolled at most (0: they are scanned, as in deep models).
# Ranks 4 and 16 take different ways to a ghost norm; a classifier has a head.
CASES = {
    "classifier": (CLASSIFIER, lora.LoraConfig(4, 8), False, 3),
    "classifier, frozen A": (CLASSIFIER, lora.LoraConfig(16, 8, ("q", "down"), last_layers=1), True, 0),
    "language model": (MLM, lora.LoraConfig(16, 8, ("all-linear",), last_layers=2), False, 0),
    "language model, frozen A": (MLM, lora.LoraConfig(4, 8, ("v", "o")), True, 0),
}
FORMS = ("vmap", "broadcast", "ghost")
ONES = np.ones(3, np.float32)
# "vmap" is the definition, and does nothing of its own with a scan or a frozen A: two cases stand for it.
RUNS = [(case, form) for case in CASES for form in FORMS]
FAST = [run for run in RUNS if run[1] != "vmap" or run[0] in ("classifier", "language model, frozen A")]
runs = pytest.mark.parametrize(("case", "form"), mostly_slow(FAST, RUNS))
forms = pytest.mark.parametrize("form", FORMS)


@functools.cache
def setup(case, dtype=jnp.float32):
    """(model, params, adapter with every leaf random, batch of three rows)."""
    name, config, frozen, _ = CASES[case]
    model, params = models.from_pretrained(GOLDEN / name, dtype)
    rng = np.random.default_rng(0)
    adapter = lora.init(jax.random.key(0), model, params, config)
    adapter = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), adapter)
    if frozen:
        params, adapter = lora.freeze_a(params, adapter)
    with np.load(GOLDEN / name / "golden.npz") as file:
        batch = {key: file[key].astype(np.int32) for key in ("input_ids", "attention_mask")}
    batch["token_type_ids"] = np.zeros_like(batch["input_ids"])
    batch["labels"] = np.array([0, 1, 2], np.int32)
    if name == MLM:
        batch["loss_mask"] = batch["attention_mask"] * (np.arange(17) % 3 > 0)
    return model, params, adapter, batch


def loss_of(model, params):
    return (losses.classification if model.config.num_labels else losses.language_model)(model, params)


@functools.cache
def compiled(case, form, dtype=jnp.float32):
    """`clipped_grad_sum` of a case as one compiled function, so that a test costs no compilation of its own."""
    model = setup(case, dtype)[0]

    def run(params, adapter, batch, clip_norm, weights):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "SHALLOW", CASES[case][3])
            return clipped_grad_sum(loss_of(model, params), adapter, batch, clip_norm, weights, form)

    run = jax.jit(run)
    # A Python number and a numpy one would each compile anew.
    return lambda params, adapter, batch, clip_norm, weights: run(
        params, adapter, batch, np.float32(clip_norm), weights
    )


@functools.cache
def reference(case):
    """Each row's gradient (a list of float64 leaves) and loss, by a Python loop over batches of one row."""
    model, params, adapter, batch = setup(case)
    one = jax.jit(jax.value_and_grad(lambda adapter, row: loss_of(model, params)(adapter, row)[0]))
    rows = [one(adapter, {name: value[i : i + 1] for name, value in batch.items()}) for i in range(3)]
    return [[np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(g)] for _, g in rows], [v for v, _ in rows]


def norm(tree):
    return np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree)))


def difference(left, right):
    return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), left, right)


def one_hot(row):
    return np.eye(3, dtype=np.float32)[row]


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@runs
def test_every_form_is_the_clipped_sum_of_a_loop(case, form):
    _, params, adapter, batch = setup(case)
    grads, values = reference(case)
    norms = np.array([norm(g) for g in grads])
    clip_norm, weights = np.sort(norms)[1], np.array([1, 1, 0.25], np.float32)  # the median: some are clipped, some not
    grad_sum, reported, reported_losses = compiled(case, form)(params, adapter, batch, clip_norm, weights)
    np.testing.assert_allclose(reported, norms, rtol=1e-4)
    np.testing.assert_allclose(reported_losses, values, rtol=1e-5)
    factors = weights * np.minimum(1, clip_norm / norms)
    assert jax.tree.structure(grad_sum) == jax.tree.structure(adapter)
    for leaf, *rows in zip(jax.tree.leaves(grad_sum), *grads, strict=True):
        expected = sum(factor * row for factor, row in zip(factors, rows, strict=True))
        np.testing.assert_allclose(leaf, expected, atol=2e-5 * clip_norm)
        assert leaf.dtype == jnp.float32


@runs
@pytest.mark.parametrize("clip_norm", [1e-3, 0.5, 1e4])
def test_no_row_contributes_more_than_clip_norm(case, form, clip_norm):
    _, params, adapter, batch = setup(case)
    for row in range(3):
        contribution, norms, _ = compiled(case, form)(params, adapter, batch, clip_norm, one_hot(row))
        assert norm(contribution) <= clip_norm * (1 + 1e-5)
        assert norm(contribution) == pytest.approx(min(clip_norm, float(norms[row])), rel=1e-4)


@runs
def test_one_row_moves_the_sum_by_at_most_clip_norm(case, form):
    _, params, adapter, batch = setup(case)
    run, clip_norm = compiled(case, form), 0.05
    whole, _, _ = run(params, adapter, batch, clip_norm, ONES)
    for row in range(3):
        without, _, _ = run(params, adapter, batch, clip_norm, ONES - one_hot(row))  # a null record in its place
        assert 0.9 * clip_norm < norm(difference(whole, without)) <= clip_norm * (1 + 1e-5)


@runs
def test_a_row_of_weight_zero_adds_nothing_whatever_it_holds(case, form):
    _, params, adapter, batch = setup(case)
    poisoned = batch | {"input_ids": batch["input_ids"].copy()}
    poisoned["input_ids"][1, 1:3] = 10**6  # beyond the vocabulary: nan
    weights = np.array([1, 0, 1], np.float32)
    clean, clean_norms, _ = compiled(case, form)(params, adapter, batch, 0.5, weights)
    grad_sum, norms, values = compiled(case, form)(params, adapter, poisoned, 0.5, weights)
    assert np.isnan(values[1])
    assert_equal(grad_sum, clean)
    assert_equal(norms, clean_norms)
    assert norms[1] == 0
    assert norm(compiled(case, form)(params, adapter, poisoned, 0.5, 0 * ONES)[0]) == 0


@runs
@pytest.mark.parametrize("poison", [np.inf, np.nan])
def test_a_row_with_a_gradient_that_is_not_finite_adds_nothing_and_reports_inf(case, form, poison):
    _, params, adapter, batch = setup(case)
    segment = params["embed"]["segment"].at[1, 0].set(poison)
    params = params | {"embed": params["embed"] | {"segment": segment}}
    hit = batch | {"token_type_ids": batch["token_type_ids"].copy()}
    hit["token_type_ids"][1, 2] = 1
    clean, clean_norms, _ = compiled(case, form)(params, adapter, batch, 0.5, ONES - one_hot(1))
    grad_sum, norms, _ = compiled(case, form)(params, adapter, hit, 0.5, ONES)
    assert_equal(grad_sum, clean)
    assert_equal(norms, clean_norms.at[1].set(jnp.inf))
    assert norm(grad_sum) > 0


@pytest.mark.parametrize("form", FORMS[1:])
def test_the_sum_over_bfloat16_activations_is_float32_and_bounded(form):
    _, params, adapter, batch = setup("classifier", jnp.bfloat16)
    run = compiled("classifier", form, jnp.bfloat16)
    grad_sum, norms, _ = run(params, adapter, batch, 0.5, ONES)
    for leaf in jax.tree.leaves(grad_sum):
        assert leaf.dtype == jnp.float32
        assert (leaf != leaf.astype(jnp.bfloat16).astype(jnp.float32)).any()  # no sum was rounded to bfloat16
    exact = compiled("classifier", form)(*setup("classifier")[1:], 0.5, ONES)
    np.testing.assert_allclose(norms, exact[1], rtol=0.02)
    assert norm(difference(grad_sum, exact[0])) < 0.05 * norm(exact[0])
    # What is scaled is what was measured: not a backward pass of its own, which would round anew.
    assert all(norm(run(params, adapter, batch, 0.5, one_hot(row))[0]) <= 0.5 * (1 + 1e-5) for row in range(3))


@pytest.mark.parametrize("form", mostly_slow(FORMS[1:], FORMS))
def test_clients_under_vmap_equal_a_loop_over_clients(form):
    model, params, adapter, batch = setup("classifier")
    adapters = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), adapter)
    batches = jax.tree.map(lambda x: np.stack([x, x[::-1]]), batch)
    weights = np.array([[1, 1, 1], [1, 0, 0.5]], np.float32)

    def client(adapter, batch, weights):
        return clipped_grad_sum(losses.classification(model, params), adapter, batch, 0.5, weights, form)

    together = jax.jit(jax.vmap(client))(adapters, batches, weights)
    for k in range(2):
        mine = jax.tree.map(lambda x, k=k: x[k], (adapters, batches))
        alone = compiled("classifier", form)(params, *mine, 0.5, weights[k])
        jax.tree.map(lambda a, b, k=k: np.testing.assert_allclose(a[k], b, atol=1e-5), together, alone)


class Linear:
    """The smallest model: a head on `x` [B, 3]."""

    def apply(self, params, batch, adapter):
        return lora.head(batch["x"], adapter["head"])


def toy(of_logits):
    return losses.ModelLoss(Linear(), None, of_logits)


HEAD = {"head": {"kernel": jnp.array([[1.0, -1], [0, 2], [0.5, 0]]), "bias": jnp.zeros(2)}}


@forms
def test_a_finite_loss_with_an_infinite_slope_adds_nothing_and_reports_inf(form):
    loss = toy(lambda logits, batch: jnp.sqrt(jnp.abs(logits[:, 0])))
    batch = {"x": jnp.array([[0.0, 0, 0], [4, 0, 0]])}
    grad_sum, norms, values = clipped_grad_sum(loss, HEAD, batch, 1.0, form=form)
    assert values[0] == 0
    assert np.isinf(norms[0])
    assert_equal(grad_sum, clipped_grad_sum(loss, HEAD, batch, 1.0, jnp.array([0.0, 1]), form)[0])
    assert norm(grad_sum) == pytest.approx(1)


@forms
def test_known_values(form):
    loss = toy(lambda logits, batch: logits[:, 0])
    batch = {
        "x": jnp.array([[3.0, 4, 0], [0, 0, 0]])
    }  # gradients (3, 4, 0; 1) of norm sqrt(26) and (0, 0, 0; 1) of norm 1
    grad_sum, norms, _ = clipped_grad_sum(loss, HEAD, batch, 2.0, form=form)
    np.testing.assert_allclose(norms, [np.sqrt(26), 1], rtol=1e-6)
    shrunk = 2 / np.sqrt(26)
    np.testing.assert_allclose(grad_sum["head"]["kernel"][:, 0], [3 * shrunk, 4 * shrunk, 0], rtol=1e-6)
    np.testing.assert_allclose(grad_sum["head"]["bias"], [shrunk + 1, 0], rtol=1e-6)
    assert not grad_sum["head"]["kernel"][:, 1].any()


RUN_TOY = {
    form: jax.jit(
        functools.partial(
            clipped_grad_sum, toy(lambda logits, batch: batch["y"] * jnp.square(logits).sum(1)), form=form
        )
    )
    for form in FORMS
}
numbers = st.floats(-(2.0**30), 2.0**30, width=32)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=3, max_size=3), st.sampled_from([1e-3, 1.0, 1e3])
)
def test_any_data_contributes_at_most_clip_norm_and_forms_agree(rows, clip_norm):
    table = np.array(rows, np.float32)
    batch = {"x": table[:, :3], "y": table[:, 3]}
    sums = {form: run(HEAD, batch, clip_norm, ONES) for form, run in RUN_TOY.items()}
    for form, run in RUN_TOY.items():
        for row in range(3):
            assert norm(run(HEAD, batch, clip_norm, one_hot(row))[0]) <= clip_norm * (1 + 1e-5)
        assert norm(difference(sums[form][0], sums["vmap"][0])) <= 1e-5 * clip_norm
        np.testing.assert_allclose(sums[form][1], sums["vmap"][1], rtol=1e-5)


def test_auto_takes_vmap_for_a_plain_function():
    model_loss = toy(lambda logits, batch: jnp.square(logits).sum(1))
    batch = {"x": jnp.array([[3.0, 4, 0], [1, 0, 2]])}

    def plain(adapter, batch):
        return model_loss(jax.tree.map(jnp.square, adapter), batch)  # a fast form would see a slope of zero

    assert_equal(clipped_grad_sum(plain, HEAD, batch, 1.0), clipped_grad_sum(plain, HEAD, batch, 1.0, form="vmap"))


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="unknown clipping form 'fast'; known: auto, vmap, broadcast, ghost"):
        clipped_grad_sum(toy(None), HEAD, {"x": jnp.ones((2, 3))}, 1.0, form="fast")


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_fast_form_of_a_plain_function_is_refused(form):
    with pytest.raises(ValueError, match=rf"form '{form}' needs a loss made by dplora_jax\.losses"):
        clipped_grad_sum(lambda adapter, batch: batch["x"].sum(1), HEAD, {"x": jnp.ones((2, 3))}, 1.0, form=form)
