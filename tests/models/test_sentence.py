"""A sentence model's files are read as sentence-transformers reads them, every spelling of a mode by its own name."""

import json

import pytest

from dplora_jax import models
from dplora_jax.errors import InputError
from dplora_jax.models import sentence
from tests.models.checkpoints import TENSORS, write

BODY = {name: value for name, value in TENSORS.items() if not name.startswith("classifier")}


def sentence_model(directory, pooling, **files):
    """A sentence model of the tiny BERT: `pooling` is its 1_Pooling/config.json, `files` {stem: document} lie beside it."""
    write(directory, BODY, architectures=["BertModel"])
    modules = [
        {"type": "sentence_transformers.base.modules.transformer.Transformer", "path": ""},
        {"type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling", "path": "1_Pooling"},
    ]
    (directory / "1_Pooling").mkdir()
    for name, document in {"modules": modules, "1_Pooling/config": pooling, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(document))
    return directory


@pytest.mark.parametrize(
    ("document", "modes"),
    [
        ({"pooling_mode": "mean"}, ["mean"]),  # as sentence-transformers 5.4 and later write it
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, ["cls"]),  # the name wins over the switches
        ({"pooling_mode": "mean", "pooling_mode_cls_token": True}, ["mean"]),
        ({"pooling_mode": ["cls", "max"]}, ["cls", "max"]),
        ({"pooling_mode": ["mean"]}, ["mean"]),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, ["cls", "mean"]),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, ["max"]),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, ["lasttoken"]),
        ({"word_embedding_dimension": 48}, ["mean"]),  # its default
    ],
)
def test_modes_are_named_as_their_library_reads_them(tmp_path, document, modes):
    assert sentence.pooling_modes(document) == modes
    place = sentence_model(tmp_path, document)
    if modes == ["mean"]:
        assert models.from_pretrained(place, num_labels=2)[0].config.pooling == "mean"
    else:
        with pytest.raises(InputError, match=f"only mean pooling is supported, not {', '.join(modes)}"):
            models.from_pretrained(place, num_labels=2)


def test_a_prompt_before_every_text_is_refused(tmp_path):
    settings = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": None}
    place = sentence_model(tmp_path, {"pooling_mode": "mean"}, config_sentence_transformers=settings)
    models.from_pretrained(place, num_labels=2)
    for name, accepted in (("document", True), ("query", False), ("missing", False)):
        (place / "config_sentence_transformers.json").write_text(json.dumps(settings | {"default_prompt_name": name}))
        if accepted:
            models.from_pretrained(place, num_labels=2)
        else:
            with pytest.raises(InputError, match=f"default_prompt_name='{name}'"):
                models.from_pretrained(place, num_labels=2)


def test_lower_case_is_the_first_config_that_is_there_and_only_of_a_sentence_model(tmp_path):
    place = sentence_model(tmp_path, {}, **{"sentence_roberta_config": {"do_lower_case": True}})
    assert sentence.lower_cases(place)
    (place / "sentence_bert_config.json").write_text('{"do_lower_case": false}')
    assert not sentence.lower_cases(place)
    (place / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    assert sentence.lower_cases(place)
    (place / "modules.json").unlink()
    assert not sentence.lower_cases(place)
