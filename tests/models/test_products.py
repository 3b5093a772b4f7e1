"""Products with weights narrower than what flows between them: what is rounded, what is not, and whole models of such weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import lora, losses, models, next_token
from dplora_jax.models import products
from dplora_jax.privacy import clipping
from tests.conftest import GOLDEN

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(3, 5, 96)), jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(96, 40)), jnp.bfloat16)
G = jnp.asarray(RNG.normal(size=(3, 5, 40)), jnp.float32)
FAMILIES = ["families/modernbert_mlm", "families/distilbert_classifier", "families/gemma2", "variants/gpt2_untied"]

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(params=[True, False], ids=["a CPU that multiplies bfloat16", "one that does not"])
def native(request, monkeypatch):
    monkeypatch.setattr(products, "cpu_multiplies_bfloat16", lambda: request.param)
    return request.param


def exact(x, kernel, rounded):
    """Their product in double precision; `x` rounded to bfloat16 first, if `rounded`."""
    x = x.astype(jnp.bfloat16) if rounded else x
    return np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)


def test_a_product_rounds_its_factors_and_neither_the_sum_nor_the_result(native):
    y, back = jax.vjp(lambda x: products.matmul(x, KERNEL), X)
    for found, expected in ((y, exact(X, KERNEL, native)), (back(G)[0], exact(G, KERNEL.T, native))):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def operands(function, *arguments):
    """The number types of the factors of each matrix product that is compiled."""
    text = jax.jit(function).lower(*arguments).as_text()
    return [line.split(": (")[1].split(")")[0] for line in text.splitlines() if "dot_general" in line]


def next_tokens(x):
    """The loss of next tokens, whose vocabulary is a frozen weight too: its gradient for hidden states."""
    targets = jnp.zeros(x.shape[:2], jnp.int32)[:, 1:]
    return jax.grad(lambda x: next_token.loss(x, KERNEL.T, targets, jnp.ones(targets.shape)).sum())(x)


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (jax.grad(lambda x: jnp.square(products.matmul(x, KERNEL)).sum()), 2),
        (next_tokens, 2),
        (lambda x: products.einsum("bti,io->bto", x, KERNEL), 1),
    ],
    ids=["a dense layer", "the vocabulary and its loss", "logits"],
)
def test_both_passes_multiply_bfloat16_where_the_cpu_can(native, function, count):
    found = operands(lambda x: function(x), X)  # traced anew, for this CPU
    assert len(found) == count
    assert all(types.count("xbf16>") == 2 * native for types in found)  # mixed factors would be widened one by one


def test_equal_types_are_multiplied_as_they_are():
    for dtype in (jnp.float32, jnp.bfloat16):
        x, kernel = X.astype(dtype), KERNEL.astype(dtype)
        np.testing.assert_array_equal(products.matmul(x, kernel), x @ kernel)
    low = products.matmul(X.astype(jnp.bfloat16), KERNEL.astype(jnp.float32))
    np.testing.assert_array_equal(low, X.astype(jnp.bfloat16) @ KERNEL)


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 avx512vnni", True),
        ("flags\t\t: fpu avx2 avx512f amx_tile amx_bf16", True),
        ("Features\t: fp asimd", False),
        ("flags\t\t: fpu avx2 avx512f avx512vnni", False),
        (None, False),
    ],
)
def test_what_the_processor_says_of_itself_is_read(monkeypatch, text, known):
    def read_text(path):
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(products.pathlib.Path, "read_text", read_text)
    assert products.cpu_multiplies_bfloat16.__wrapped__() == known


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mixed_model_rounds_its_products_and_no_more(name, native):
    """Beside a wide model of the same weights: nothing where the CPU widens them, else less than a narrow model does."""
    with np.load(GOLDEN / name / "golden.npz") as file:
        batch = {key: file[key] for key in ("input_ids", "attention_mask")}
    (mixed, params), (narrow, _) = (models.from_pretrained(GOLDEN / name, dtype) for dtype in ("mixed", "bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}

    def logits(model, params):
        found = np.asarray(jax.jit(model.apply)(params, batch))
        return found[batch["attention_mask"] == 1] if found.ndim == 3 else found

    widened = {  # embeddings are added up as they are
        part: leaves if part == "embed" else jax.tree.map(lambda leaf: leaf.astype(jnp.float32), leaves)
        for part, leaves in params.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "cpu_multiplies_bfloat16", lambda: False)
        expected = logits(mixed, widened)
    off, more = (
        np.sqrt(np.square(logits(model, params) - expected).mean() / np.square(expected).mean())
        for model in (mixed, narrow)
    )
    assert off < 1e-5 if not native else 1e-4 < off < more


@pytest.mark.parametrize("form", clipping.FORMS[1:])
def test_rows_of_a_mixed_model_are_clipped_to_the_norm(form, native):
    model, params = models.from_pretrained(GOLDEN / "variants/llama_mqa", "mixed")
    adapter = lora.init(jax.random.key(0), model, params, lora.LoraConfig(2, 4, ("q", "down")))
    adapter = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)
    batch = {"input_ids": RNG.integers(0, 61, (3, 9)), "attention_mask": np.ones((3, 9), np.int32)}
    clip_norm = 0.01

    @jax.jit
    def clipped(weights):
        loss = losses.language_model(model, params)
        return clipping.clipped_grad_sum(loss, adapter, batch, clip_norm, weights, form)

    total, norms, _ = clipped(jnp.ones(3))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(total))
    assert min(norms) > clip_norm
    for row in range(3):
        alone = clipped(jnp.arange(3) == row)[0]
        assert (
            0.99 * clip_norm
            < np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(alone)))
            <= clip_norm * (1 + 1e-6)
        )
