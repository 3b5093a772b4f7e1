"""Generation with a cache against the whole row run anew for every token; where rows end; what is drawn at a temperature."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from dplora_jax import generation, lora, models
from dplora_jax.models import layers
from tests.compilation import jit
from tests.conftest import GOLDEN, mostly_slow

pytestmark = pytest.mark.usefixtures("quick_compile")
GPT2, LLAMA, WINDOW, GLM, GLM2 = (
    *("variants/gpt2_untied", "variants/llama_mqa", "variants/mistral_window"),
    *("chatglm_tiny", "chatglm2_tiny"),
)
NEW = 12  # tokens


@functools.cache
def load(name):
    """(model, params, prompts of 13, 9 and 5 tokens whose padding is not zero, the reference's continuations or None)."""
    model, params = models.from_pretrained(GOLDEN / name)
    with np.load(GOLDEN / name / "golden.npz") as file:
        ids = file["input_ids"][:, :13].astype(np.int32)
        generated = file.get("generated")
    mask = np.arange(13) < np.array([[13], [9], [5]])
    if name == GLM:  # its prompts end in [gMASK] and the start token
        ids = np.random.default_rng(0).integers(5, 100, (3, 13), np.int32)
        for row, length in enumerate(mask.sum(1)):
            ids[row, length - 2 : length] = 139, 140
        # As it stands it repeats its last token: other logits and a louder attention make it say more.
        params["lm_head"] = jax.random.normal(jax.random.key(0), params["lm_head"].shape)
        params["layers"]["dense"]["kernel"] *= 20
    return model, params, {"input_ids": ids, "attention_mask": mask.astype(np.int32)}, generated


def generate(model, params, batch, adapter=None, **options):
    run = functools.partial(generation.generate, model, max_new_tokens=NEW, **options)
    return np.asarray(jit(lambda params, batch, adapter: run(params, batch, adapter=adapter))(params, batch, adapter))


@functools.cache
def continued(name):
    return generate(*load(name)[:3])


@functools.partial(jit, static_argnums=0)
def uncached(model, params, batch, adapter=None):
    """[B, N]: the likeliest next token, over and over, from `apply` on all of the row; what stands behind it, none can see."""
    length, rows = batch["attention_mask"].sum(1), jnp.arange(3)
    ids = jnp.pad(batch["input_ids"], ((0, 0), (0, NEW)))

    def one(ids, step):
        token = model.apply(params, {"input_ids": ids}, adapter)[rows, length + step - 1].argmax(-1).astype(ids.dtype)
        return ids.at[rows, length + step].set(token), token

    return jax.lax.scan(one, ids, jnp.arange(NEW))[1].T


@pytest.mark.parametrize("name", mostly_slow([GPT2, WINDOW, GLM], [GPT2, LLAMA, WINDOW, GLM, GLM2]))
def test_greedy_tokens_are_those_of_the_whole_row_run_anew_whatever_the_padding(name):
    model, params, batch, generated = load(name)
    tokens = continued(name)
    np.testing.assert_array_equal(tokens, uncached(model, params, batch))
    assert len(np.unique(tokens)) > 3  # a model that repeats itself would prove little
    if generated is not None:
        np.testing.assert_array_equal(tokens, generated)


@pytest.mark.parametrize("name", [WINDOW, GLM])
def test_a_row_continues_as_it_does_alone_and_unpadded(name):
    model, params, batch, _ = load(name)
    alone = generate(model, params, {"input_ids": batch["input_ids"][2:, :5]})
    np.testing.assert_array_equal(alone, continued(name)[2:])


def test_a_prompt_of_one_token_continues_like_any_other():
    model, params, batch, _ = load(LLAMA)
    short = {"input_ids": batch["input_ids"][:, :1], "attention_mask": np.ones((3, 1), np.int32)}
    np.testing.assert_array_equal(generate(model, params, short), uncached(model, params, short))


def trained(model, params):
    """An adapter on the last layer alone that changes what is said."""
    rng = np.random.default_rng(0)
    adapter = lora.init(jax.random.key(0), model, params, lora.LoraConfig(4, 8, ("all-linear",), last_layers=1))
    return jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.5, leaf.shape).astype(np.float32), adapter)


def test_an_adapter_takes_part_even_with_its_a_frozen():
    model, params, batch, _ = load(LLAMA)
    adapter = trained(model, params)
    expected = np.asarray(uncached(model, params, batch, adapter))
    assert (expected != continued(LLAMA)).any(1).all()
    params, adapter = lora.freeze_a(params, adapter)
    np.testing.assert_array_equal(generate(model, params, batch, adapter), expected)


def test_scanned_layers_remember_what_unrolled_ones_do(monkeypatch):
    model, params, batch, _ = load("variants/gpt2_scaled")
    adapter = trained(model, params)
    expected = uncached(model, params, batch, adapter)
    monkeypatch.setattr(layers, "SHALLOW", 0)
    np.testing.assert_array_equal(generate(model, params, batch, adapter), expected)


PLACES = []


@dataclasses.dataclass(frozen=True)
class Chain:
    """A stand-in for a decoder: `params` [V, V] are the logits after each token, and PLACES gets those of each further step."""

    max_positions: int = 64

    @property
    def config(self):
        return self

    def prefill(self, params, batch, size, adapter):
        last = batch["attention_mask"].sum(1) - 1
        return params[batch["input_ids"][jnp.arange(len(last)), last]], None

    def extend(self, params, batch, token, place, cache, adapter):
        jax.debug.callback(lambda place: PLACES.append(place.tolist()), place)
        return params[token], cache


COUNT = np.roll(np.eye(10, dtype=np.float32), 1, axis=1)  # after each digit comes the next
DIGITS = {"input_ids": np.array([[0, 2, 3], [6, 0, 0], [1, 8, 0]]), "attention_mask": [[1, 1, 1], [1, 0, 0], [1, 1, 0]]}
DIGITS = {name: np.asarray(value, np.int32) for name, value in DIGITS.items()}


@pytest.mark.parametrize(
    ("end_tokens", "expected", "steps"),
    [
        ((9,), [[4, 5, 6, 7, 8, 9, 50, 50], [7, 8, 9, 50, 50, 50, 50, 50], [9, 50, 50, 50, 50, 50, 50, 50]], 5),
        ((5, 9), [[4, 5, 50, 50, 50, 50, 50, 50], [7, 8, 9, 50, 50, 50, 50, 50], [9, 50, 50, 50, 50, 50, 50, 50]], 2),
        ((), [[4, 5, 6, 7, 8, 9, 0, 1], [7, 8, 9, 0, 1, 2, 3, 4], [9, 0, 1, 2, 3, 4, 5, 6]], 7),
    ],
)
def test_rows_end_with_their_end_token_and_the_loop_with_the_last_row(end_tokens, expected, steps):
    PLACES.clear()
    tokens = generation.generate(Chain(), COUNT, DIGITS, max_new_tokens=8, end_tokens=end_tokens, pad_token=50)
    np.testing.assert_array_equal(tokens, expected)
    jax.effects_barrier()
    assert sorted(PLACES) == [[3 + step, 1 + step, 2 + step] for step in range(steps)]  # each row's own places


LOGITS = 1.5 * np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
MANY = {"input_ids": np.full((20_000, 1), 2, np.int32), "attention_mask": np.ones((20_000, 1), np.int32)}


def draw(temperature, seed):
    options = {"max_new_tokens": 2, "temperature": temperature, "key": jax.random.key(seed)}
    return np.asarray(generation.generate(Chain(), LOGITS, MANY, **options))


def test_tokens_are_drawn_from_the_softmax_at_that_temperature_each_by_itself():
    first, second = draw(0.7, 0).T
    softmax = np.asarray(jax.nn.softmax(LOGITS.astype(np.float64) / 0.7))
    expected = softmax[2][:, None] * softmax  # of the pair: a draw that was used twice would couple them
    counts = np.bincount(4 * first + second, minlength=16)
    assert chisquare(counts, len(first) * expected.ravel(), sum_check=False).pvalue > 1e-6  # the false-alarm rate


def test_a_key_fixes_what_is_drawn_and_a_low_temperature_is_greedy():
    np.testing.assert_array_equal(draw(0.7, 3), draw(0.7, 3))
    assert (draw(0.7, 3) != draw(0.7, 4)).any()
    greedy = generation.generate(Chain(), LOGITS, MANY, max_new_tokens=2)
    np.testing.assert_array_equal(draw(1e-4, 3), greedy)
    np.testing.assert_array_equal(greedy[0], [LOGITS[2].argmax(), LOGITS[LOGITS[2].argmax()].argmax()])


def test_mistakes_are_named_before_anything_runs():
    with pytest.raises(ValueError, match="65 tokens are more than the model's 64 positions"):
        generation.generate(Chain(), COUNT, DIGITS, max_new_tokens=62)
    with pytest.raises(ValueError, match="a temperature above 0 needs a key"):
        generation.generate(Chain(), COUNT, DIGITS, max_new_tokens=2, temperature=0.5)
    with pytest.raises(ValueError, match="max_new_tokens=0 must be 1 or more"):
        generation.generate(Chain(), COUNT, DIGITS, max_new_tokens=0)
    left = np.array([[0, 1, 1], [1, 1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="padded to the right"):
        generation.generate(Chain(), COUNT, {"input_ids": left, "attention_mask": left}, max_new_tokens=2)
    with pytest.raises(ValueError, match="cannot have position_ids"):
        generation.generate(Chain(), COUNT, {**DIGITS, "position_ids": DIGITS["input_ids"]}, max_new_tokens=2)
    assert generation.generate(Chain(8), COUNT, DIGITS, max_new_tokens=5).shape == (3, 5)
