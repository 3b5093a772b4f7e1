"""Where a tokenizer and a model meet: every id has its row of the embeddings."""

import json
import shutil
import types

import pytest

from dplora_jax import models
from dplora_jax.data import encoding
from dplora_jax.errors import InputError


def model(rows):
    return types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=rows))


@pytest.fixture
def place(tiny_bert, tmp_path):
    """A copy of the tiny BERT (20 rows, ids 0 to 19)."""
    return shutil.copytree(tiny_bert, tmp_path / "model")


def edited(place, change):
    document = json.loads((place / "tokenizer.json").read_text())
    change(document)
    (place / "tokenizer.json").write_text(json.dumps(document))
    return models.load_tokenizer(place)


def test_a_tokenizer_of_as_many_ids_as_rows_or_fewer_fits(place):
    tokenizer = models.load_tokenizer(place)
    assert max(tokenizer.get_vocab().values()) == 19  # so that the next row count below is refused
    encoding.check_ids(model(20), tokenizer)
    encoding.check_ids(model(128), tokenizer)  # rows padded to a multiple
    with pytest.raises(InputError, match="19 rows"):
        encoding.check_ids(model(19), tokenizer)


def test_words_added_without_resizing_are_refused_with_both_numbers(place):
    tokenizer = models.load_tokenizer(place)
    tokenizer.add_tokens(["remdesivir", "favipiravir"])
    tokenizer.save_pretrained(place)
    with pytest.raises(InputError, match=r"the id 21 \('favipiravir'\).* 20 rows"):
        encoding.check_ids(model(20), models.load_tokenizer(place))


def test_a_pad_token_of_its_own_is_refused_too(place):
    tokenizer = models.load_tokenizer(place)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(InputError, match="the id 20"):
        encoding.check_ids(model(20), tokenizer)


def test_ids_that_only_the_post_processor_has_are_refused(place):
    tokenizer = edited(place, lambda document: document["post_processor"].update(cls=["[CLS]", 101]))
    assert max(tokenizer.get_vocab().values()) == 19
    with pytest.raises(InputError, match="the id 101"):
        encoding.check_ids(model(20), tokenizer)


def test_a_base_of_fewer_rows_is_refused(place):
    with pytest.raises(InputError, match=r"the id 19.* 19 rows"):
        encoding.check_ids(model(19), models.load_tokenizer(place))
