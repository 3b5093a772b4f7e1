"""Where a folder says a thing twice, the model is transformers', or there is a sentence."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from dplora_jax import models
from dplora_jax.errors import InputError
from tests.conftest import GOLDEN

pytestmark = pytest.mark.usefixtures("quick_compile")
IDS = {"input_ids": np.arange(3, 15).reshape(2, 6)}


def copy(name, directory, tensors=(), **changes):
    """A golden model's folder with other tensors (None removes) and options."""
    shutil.copytree(GOLDEN / name, directory)
    path = directory / "model.safetensors"
    changed = safetensors.numpy.load_file(path) | dict(tensors)
    safetensors.numpy.save_file({k: v for k, v in changed.items() if v is not None}, path)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def logits(directory):
    model, params = models.from_pretrained(directory)
    return jax.jit(model.apply)(params, IDS)


@pytest.mark.parametrize(
    ("name", "embedding"), [("gpt2_tiny", "transformer.wte.weight"), ("llama_tiny", "model.embed_tokens.weight")]
)
def test_an_output_matrix_that_differs_is_not_tied_whatever_the_config_says(tmp_path, name, embedding):
    word = safetensors.numpy.load_file(GOLDEN / name / "model.safetensors")[embedding]
    other = np.random.default_rng(0).normal(0, 0.1, word.shape).astype(np.float32)
    own = logits(copy(name, tmp_path / "own", {"lm_head.weight": other}, tie_word_embeddings=False))
    np.testing.assert_array_equal(
        logits(copy(name, tmp_path / "contradicted", {"lm_head.weight": other}, tie_word_embeddings=True)), own
    )
    tied = logits(copy(name, tmp_path / "tied", {"lm_head.weight": None}, tie_word_embeddings=True))
    same = copy(name, tmp_path / "same", {"lm_head.weight": word.copy()}, tie_word_embeddings=True)
    np.testing.assert_array_equal(logits(same), tied)
    assert models.from_pretrained(same)[0].config.tied
    assert np.abs(tied - own).max() > 0.01


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"cls.predictions.decoder.weight": np.zeros((99, 48), np.float32)}, "cls.predictions.decoder.weight differs"),
        ({"cls.predictions.decoder.bias": np.ones(99, np.float32)}, "cls.predictions.decoder.bias differs"),
        (
            {"cls.predictions.decoder.bias": np.ones(99, np.float32), "cls.predictions.bias": None},
            "cls.predictions.decoder.bias differs from cls.predictions.bias",
        ),
    ],
)
def test_a_masked_language_model_with_an_output_layer_of_its_own_is_refused(tmp_path, tensors, words):
    with pytest.raises(InputError) as caught:
        models.from_pretrained(copy("bert_tiny_mlm", tmp_path / "bert", tensors))
    assert words in str(caught.value)


def test_an_equal_copy_of_the_tied_layer_is_no_other(tmp_path):
    word = safetensors.numpy.load_file(GOLDEN / "bert_tiny_mlm" / "model.safetensors")
    copies = {"cls.predictions.decoder.weight": word["bert.embeddings.word_embeddings.weight"].copy()}
    np.testing.assert_array_equal(
        logits(copy("bert_tiny_mlm", tmp_path / "m", copies)), logits(GOLDEN / "bert_tiny_mlm")
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transformers_weights": "other.safetensors"}, "transformers_weights='other.safetensors'"),
        ({"per_layer_config": {"0": {"num_attention_heads": 2}}}, "per_layer_config"),
        ({"num_hidden_layers": 1}, "num_hidden_layers=1 beside n_layer="),
        ({"hidden_size": 5}, "hidden_size=5 beside n_embd="),
    ],
)
def test_a_second_source_of_weights_or_sizes_is_refused_by_its_name(tmp_path, changes, words):
    with pytest.raises(InputError) as caught:
        models.from_pretrained(copy("gpt2_tiny", tmp_path / "gpt2", **changes))
    assert words in str(caught.value)


def test_an_adapter_in_the_models_own_folder_is_refused(tmp_path):
    place = copy("gpt2_tiny", tmp_path / "gpt2")
    (place / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds adapter_config\.json beside config\.json"):
        models.from_pretrained(place)
