"""The loss from hidden states: the plain one's values and gradients, without the plain one's arrays."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import lora, losses, models, next_token
from dplora_jax.models.llama import Llama, LlamaConfig
from dplora_jax.privacy import clipping
from tests.compilation import jit
from tests.conftest import GOLDEN, mostly_slow

pytestmark = pytest.mark.usefixtures("quick_compile")
B, T, D, V = 3, 10, 8, 50
RNG = np.random.default_rng(0)
HIDDEN_BxTxD = RNG.normal(size=(B, T, D)).astype(np.float32)
VOCABULARY_VxD = RNG.normal(size=(V, D)).astype(np.float32)
TARGETS_BxT = RNG.integers(0, V, (B, T - 1))
SCATTERED_BxT = np.array(
    [[0, 1, 0, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 1]], np.float32
)
COUNTED = {"all": np.ones_like(SCATTERED_BxT), "some": SCATTERED_BxT, "in part": 0.3 * SCATTERED_BxT}


def chunked(hidden, vocabulary, counted, chunk_bytes, max_targets=None):
    return next_token.loss(hidden, vocabulary, TARGETS_BxT, counted, max_targets, chunk_bytes or next_token.CHUNK_BYTES)


def plain(hidden, vocabulary, counted):
    """The textbook's: the mean over the targets that count of -log softmax(V h)[target]; 0 where none does."""
    logits = jnp.einsum("btd,vd->btv", hidden[:, :-1].astype(jnp.float32), vocabulary.astype(jnp.float32))
    terms = -jnp.take_along_axis(jax.nn.log_softmax(logits), TARGETS_BxT[..., None], axis=-1)[..., 0]
    return (terms * counted).sum(1) / jnp.maximum(counted.sum(1), 1)


def values_and_gradients(loss):
    """[B] losses and their pullback of weights that differ from row to row, for hidden states, vocabulary and counts."""

    def total(*arrays):
        per_row = loss(*arrays)
        return (per_row * jnp.array([1.0, -2.0, 3.0])).sum(), per_row

    return jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))


@pytest.fixture(scope="module")
def expected():
    plainly = values_and_gradients(plain)
    return {name: plainly(HIDDEN_BxTxD, VOCABULARY_VxD, counted) for name, counted in COUNTED.items()}


# The default's one piece; four positions at a time, the ninth alone; one where not even that fits.
@pytest.mark.parametrize("chunk_bytes", [None, 4 * B * V * 4, 1])
def test_loss_and_all_its_gradients_are_the_plain_ones(chunk_bytes, expected):
    ours = values_and_gradients(functools.partial(chunked, chunk_bytes=chunk_bytes))
    for name, counted in COUNTED.items():
        (_, losses_B), gradients = ours(HIDDEN_BxTxD, VOCABULARY_VxD, counted)
        (_, expected_B), expected_gradients = expected[name]
        np.testing.assert_allclose(losses_B, expected_B, rtol=1e-6, atol=1e-6)
        for gradient, other in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(gradient, other, rtol=1e-6, atol=2e-6)


def test_a_row_without_targets_has_loss_zero_and_gradient_zero():
    loss = functools.partial(chunked, chunk_bytes=600, max_targets=4)
    (_, losses_B), (hidden, _, _) = values_and_gradients(loss)(HIDDEN_BxTxD, VOCABULARY_VxD, SCATTERED_BxT)
    assert losses_B[1] == 0
    assert not hidden[1].any()
    assert hidden[0].any()


def test_a_bound_on_targets_keeps_the_first_ones_wherever_they_stand():
    def with_jacobian(loss):
        return jit(lambda *arrays: (loss(*arrays), jax.jacrev(loss)(*arrays)))

    plainly = with_jacobian(plain)
    first_two = SCATTERED_BxT * (SCATTERED_BxT.cumsum(1) <= 2)
    for bound, kept, chunk_bytes in ((2, first_two, 4 * B * V), (4, SCATTERED_BxT, None)):
        bounded = with_jacobian(functools.partial(chunked, chunk_bytes=chunk_bytes, max_targets=bound))
        per_row, jacobian = bounded(HIDDEN_BxTxD, VOCABULARY_VxD, SCATTERED_BxT)
        expected, expected_jacobian = plainly(HIDDEN_BxTxD, VOCABULARY_VxD, kept)
        np.testing.assert_allclose(per_row, expected, rtol=1e-6)
        np.testing.assert_allclose(jacobian, expected_jacobian, atol=1e-6)
        across_rows = jacobian[~np.eye(B, dtype=bool)]  # [B, B, T, D]: of one row's loss for another's hidden states
        assert not across_rows.any()


def test_bfloat16_states_give_a_float32_loss_and_their_own_gradients():
    low = [jnp.asarray(x, jnp.bfloat16) for x in (HIDDEN_BxTxD, VOCABULARY_VxD)]
    loss = functools.partial(chunked, chunk_bytes=600)
    (_, losses_B), gradients = values_and_gradients(loss)(*low, SCATTERED_BxT)
    (_, expected_B), expected = values_and_gradients(plain)(*(x.astype(jnp.float32) for x in low), SCATTERED_BxT)
    assert losses_B.dtype == jnp.float32
    np.testing.assert_allclose(losses_B, expected_B, rtol=1e-5)  # products of bfloat16 are exact in float32
    for ours, theirs in zip(gradients[:2], expected[:2], strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=2**-7 * np.abs(theirs).max())


@pytest.fixture(scope="module")
def tied():
    """(model, params, adapter, batch, what clipping makes of the plain loss of each row's first two targets)."""
    model, params = models.from_pretrained(GOLDEN / "variants/llama_mqa")
    adapter = lora.init(jax.random.key(0), model, params, lora.LoraConfig(3, 6, ("q", "down")))
    adapter = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)
    mask = np.zeros((3, 13), np.int32)
    mask[0, [0, 2, 3, 9, 12]] = mask[2, 5] = 1  # a row's first token is no target
    batch = {"input_ids": RNG.integers(0, 61, (3, 13)), "loss_mask": mask, "attention_mask": np.ones((3, 13), np.int32)}
    two = batch | {"loss_mask": mask * (np.cumsum(mask * (np.arange(13) > 0), axis=1) <= 2)}
    return model, params, adapter, batch, clipped(functools.partial(of_all_logits, model, params), adapter, two, "vmap")


def of_all_logits(model, params, adapter, batch):
    return losses.language_model_of_logits(model.apply(params, batch, adapter), batch)


def clipped(loss, adapter, batch, form):
    return jit(lambda a, b: clipping.clipped_grad_sum(loss, a, b, 0.5, form=form))(adapter, batch)


@pytest.mark.parametrize("form", mostly_slow(["ghost"], ["vmap", "broadcast", "ghost"]))
def test_a_models_clipped_gradients_are_those_of_its_logits(tied, form, monkeypatch):
    model, params, adapter, batch, (expected_grad, expected_norms, expected_losses) = tied
    one_position = functools.partial(next_token.loss, chunk_bytes=4 * 61)  # at a time
    monkeypatch.setattr(next_token, "loss", one_position)
    grad, norms, per_row = clipped(losses.language_model(model, params, max_targets=2), adapter, batch, form)
    np.testing.assert_allclose(per_row, expected_losses, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-5)
    assert norms[0] > 0.5
    assert norms[1] == per_row[1] == 0
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-6), grad, expected_grad)


def test_without_a_mask_every_next_token_counts(tied):
    model, params, adapter, batch, _ = tied
    bare, marked = {"input_ids": batch["input_ids"]}, batch | {"loss_mask": np.ones((3, 13), np.int32)}
    ours = jit(losses.language_model(model, params))(adapter, bare)
    plainly = jit(functools.partial(of_all_logits, model, params))(adapter, marked)
    np.testing.assert_allclose(ours, plainly, rtol=1e-6)


def array_sizes(program):
    """How many numbers each array of a compiled program holds."""
    return {int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"\w\[(\d[\d,]*)\]", program)}


@pytest.mark.parametrize("form", mostly_slow(["vmap", "ghost"], ["vmap", "broadcast", "ghost"]))
def test_the_compiled_step_holds_no_array_larger_than_the_vocabulary_matrix(form, monkeypatch):
    rows, tokens, vocabulary, width = 4, 64, 5000, 32
    model = Llama(LlamaConfig(vocabulary, width, 1, 4, 1, 8, 24, tokens, (1.0, 0.1, 0.01, 0.001), tied=True))
    params = jax.eval_shape(model.init, jax.random.key(0))
    config = lora.LoraConfig(2, 4, ("q",))
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), model, params, config))
    batch = {"input_ids": jax.ShapeDtypeStruct((rows, tokens), jnp.int32)}
    monkeypatch.setattr(next_token, "loss", functools.partial(next_token.loss, chunk_bytes=4 * rows * vocabulary))

    def largest(make_loss):
        step = jit(lambda a, p, b: clipping.clipped_grad_sum(make_loss(p), a, b, 0.5, form=form))
        return max(array_sizes(step.lower(adapter, params, batch).compile().as_text()))

    assert largest(lambda p: losses.language_model(model, p)) == vocabulary * width < tokens * vocabulary
    if form == "broadcast":  # and the plain loss is seen to hold them
        of_logits = losses.language_model_of_logits
        assert largest(lambda p: losses.ModelLoss(model, p, of_logits)) == rows * tokens * vocabulary
