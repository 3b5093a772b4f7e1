"""A language model says a label by one token behind a prompt."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import lora, losses, models
from dplora_jax.data import encoding, tasks
from dplora_jax.errors import InputError
from dplora_jax.federation import dispatch
from dplora_jax.models import features, load_tokenizer
from dplora_jax.models.label_words import LabelWords
from dplora_jax.privacy.clipping import clipped_grad_sum
from tests import letters
from tests.conftest import GOLDEN

pytestmark = pytest.mark.usefixtures("quick_compile")
WORDS = (7, 3, 11)
NAMES = [
    "gpt2_tiny",
    "llama_tiny",
    "families/gemma2",
    "chatglm_tiny",
]  # learned positions, rotary, capped logits, two masks


def setup(name):
    """(model, params with a bias for each word, adapter with every leaf random, batch of three rows of which two are padded)."""
    model, params = models.from_pretrained(GOLDEN / name)
    params = params | {features.KEY: {"bias": jnp.array([0.5, -0.25, 2.0])}}
    rng = np.random.default_rng(0)
    adapter = lora.init(jax.random.key(0), model, params, lora.LoraConfig(4, 8, last_layers=1))
    adapter = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), adapter)
    with np.load(GOLDEN / name / "golden.npz") as file:
        ids = np.resize(file["input_ids"], (3, 9)).astype(np.int32)
    mask = (np.arange(9) < np.array([[9], [6], [4]])).astype(np.int32)
    return model, params, adapter, {"input_ids": ids, "attention_mask": mask, "labels": np.array([0, 1, 2], np.int32)}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_models_own_after_the_last_token_of_each_row(name):
    model, params, adapter, batch = setup(name)
    whole = jax.jit(model.apply)(params, batch, adapter)
    expected = np.asarray(whole)[np.arange(3), [8, 5, 3]][:, list(WORDS)] - np.array([0.5, -0.25, 2.0])
    np.testing.assert_allclose(jax.jit(LabelWords(model, WORDS).apply)(params, batch, adapter), expected, atol=1e-5)


@pytest.mark.parametrize("name", NAMES[:3])  # ChatGLM-6B looks for the token that opens its reply
def test_nothing_that_is_padded_matters(name):
    model, params, adapter, batch = setup(name)
    run = jax.jit(LabelWords(model, WORDS).apply)
    other = np.where(batch["attention_mask"], batch["input_ids"], 5)
    np.testing.assert_allclose(
        run(params, batch | {"input_ids": other}, adapter), run(params, batch, adapter), atol=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_ran_before_give_the_same(name):
    model, params, adapter, batch = setup(name)
    start = model.config.num_layers - 1
    above = batch | {"hidden": jax.jit(lambda p, b: model.prefix(p, b, start))(params, batch)}
    upper = dataclasses.replace(model, start=start)
    expected = jax.jit(LabelWords(model, WORDS).apply)(params, batch, adapter)
    np.testing.assert_allclose(jax.jit(LabelWords(upper, WORDS).apply)(params, above, adapter), expected, atol=1e-5)


@pytest.mark.parametrize("form", ["broadcast", "ghost"])
def test_rows_are_clipped_alike_in_every_form(form):
    model, params, adapter, batch = setup("llama_tiny")
    loss = losses.label_words(WORDS)(model, params)
    run = jax.jit(
        lambda form: clipped_grad_sum(loss, adapter, batch, 0.3, np.ones(3, np.float32), form), static_argnums=0
    )
    for found, expected in zip(jax.tree.leaves(run(form)), jax.tree.leaves(run("vmap")), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_of_a_loss_without_a_view_of_its_own_the_reader_is_the_model():
    model, params, *_ = setup("gpt2_tiny")
    assert losses.reader(losses.label_words(WORDS), model, params) == LabelWords(model, WORDS)
    assert losses.reader(losses.language_model, model, params) is model
    assert losses.reader(lambda model, params: lambda adapter, batch: 0, model, params) is model


def test_runs_of_one_set_of_words_may_share_a_program():
    one, same, other = (dispatch._comparable(losses.label_words(words)) for words in (WORDS, WORDS, WORDS[::-1]))
    assert one == same != other


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One whose tokens are single characters."""
    place = letters.write(tmp_path_factory.mktemp("letters") / "model", " \nabcdefghijklmnopqrstuvwxyz:?S")
    return load_tokenizer(place)


def asked(*names, text="the text"):
    return tasks.label_words(names, "Sentiment:")({"text": text, "label": len(names) - 1})


def test_what_all_labels_begin_with_stands_behind_the_prompt(tokenizer):
    shared, words = encoding.label_words(tokenizer, asked("good", "bad"))
    assert tokenizer.convert_ids_to_tokens([*shared, *words]) == [" ", "g", "b"]
    rows = encoding.questions(tokenizer, [asked("good", "bad")], 24, shared)
    assert rows["labels"].tolist() == [1]
    ids = rows["input_ids"][0][rows["attention_mask"][0] == 1]
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "the text\nSentiment: "


def test_a_prompt_that_is_too_long_keeps_its_end(tokenizer):
    rows = encoding.questions(tokenizer, [asked("good", "bad", text="x" * 50)], 16, ())
    assert rows["attention_mask"].all()
    assert "".join(tokenizer.convert_ids_to_tokens(rows["input_ids"][0])) == "xxxxx\nSentiment:"


@pytest.mark.parametrize("names", [("bad", "bold", "good"), ("good", "go"), ("no", "note")])
def test_labels_that_begin_alike_are_refused(tokenizer, names):
    with pytest.raises(InputError, match="begin with the same token"):
        encoding.label_words(tokenizer, asked(*names))
