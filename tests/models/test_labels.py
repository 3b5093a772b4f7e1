"""A base classifier's head is read by its labels' names, whatever order a task has."""

import json

import numpy as np
import pytest

from dplora_jax import models
from dplora_jax.errors import InputError
from dplora_jax.models import labels, pretrained
from tests.models.checkpoints import CONFIG, TENSORS, write

pytestmark = pytest.mark.usefixtures("quick_compile")
NAMES = ("Positive", "negative", "Neutral ")
NAMED = {"id2label": dict(enumerate(NAMES)), "label2id": {"negative": 0, "Positive": 1, "Neutral ": 2}}
KERNEL, BIAS = TENSORS["classifier.weight"].T, TENSORS["classifier.bias"]


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        (("positive", "negative", "neutral"), (0, 1, 2)),
        (("negative", "neutral", "POSITIVE"), (1, 2, 0)),
        (("negative", "positive"), (1, 0)),  # a task of fewer labels
    ],
)
def test_a_head_is_put_in_the_tasks_order_by_name(tmp_path, wanted, rows):
    place = write(tmp_path, **NAMED)  # label2id, which says otherwise, does not count
    model, params = models.from_pretrained(place, label_names=wanted)
    assert model.config.num_labels == len(wanted)
    np.testing.assert_array_equal(params["head"]["kernel"], KERNEL[:, rows])
    np.testing.assert_array_equal(params["head"]["bias"], BIAS[list(rows)])
    said = pretrained.head_start(place, wanted)
    assert (said is None) == (rows == (0, 1, 2))
    assert said is None or "in the task's order by name" in said


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (NAMED, ("negative", "neutral", "bullish")),
        (NAMED, ("negative", "neutral", "positive", "mixed")),  # one that the base never learned
        (NAMED, ("0", "1", "2")),  # numbers may mean any order
        ({"id2label": {0: "a", 1: "A", 2: "b"}}, ("a", "b")),
        ({"id2label": None}, ("negative", "neutral", "positive")),  # two labels, and a head of three
        ({"id2label": {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}}, ("negative", "neutral", "positive")),
    ],
)
def test_a_head_of_other_labels_is_fresh_and_said(tmp_path, changes, wanted):
    place = write(tmp_path, **changes)
    with pytest.warns(UserWarning, match=r"the head starts fresh, at zero\."):
        _, params = models.from_pretrained(place, label_names=wanted)
    assert params["head"]["kernel"].shape == (48, len(wanted))
    assert params["head"]["bias"].shape == (len(wanted),)
    assert not np.any(params["head"]["kernel"])
    assert not np.any(params["head"]["bias"])
    assert "the head starts fresh" in pretrained.head_start(place, wanted)


def test_numbered_labels_are_the_base_s_own_numbers(tmp_path):
    place = write(tmp_path, **{"id2label": {2: "LABEL_2", 0: "LABEL_0", 1: "LABEL_1"}})
    _, params = models.from_pretrained(place, label_names=("2", "0", "1"))
    np.testing.assert_array_equal(params["head"]["bias"], BIAS[[2, 0, 1]])


def test_a_head_that_lacks_needs_no_word(tmp_path, recwarn):
    body = {name: value for name, value in TENSORS.items() if not name.startswith("classifier")}
    place = write(tmp_path, body, architectures=["BertModel"])
    assert not np.any(models.from_pretrained(place, label_names=("a", "b"))[1]["head"]["kernel"])
    assert pretrained.head_start(place, ("a", "b")) is None
    assert not recwarn.list


def test_num_labels_counts_where_no_label_is_named(tmp_path):
    body = {name: value for name, value in TENSORS.items() if not name.startswith("classifier")}
    for document, count in (({"num_labels": 4}, 4), ({"num_labels": 4, "id2label": {0: "a", 1: "b"}}, 2), ({}, 2)):
        config = {name: value for name, value in CONFIG.items() if name not in ("id2label", "label2id")} | document
        place = write(tmp_path, body)
        (place / "config.json").write_text(json.dumps(config))
        assert models.from_pretrained(place)[0].config.num_labels == count


def test_ids_that_are_no_outputs_are_refused(tmp_path):
    for named in ({1: "a", 2: "b"}, ["a", "b"], {"x": "a"}):
        with pytest.raises(InputError, match="id2label"):
            labels.names(json.loads(json.dumps({"id2label": named})))
