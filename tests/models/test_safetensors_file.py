"""Which of a directory's safetensors files are read."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from dplora_jax import models
from tests.models.checkpoints import TENSORS, assert_same, write

STALE = {"metadata": {}, "weight_map": dict.fromkeys(TENSORS, "model-00001-of-00001.safetensors")}


@pytest.mark.parametrize("shards", ["gone", "older", "damaged"])
def test_a_whole_file_wins_over_an_index_whatever_it_names(tmp_path, shards):
    # As transformers chooses; a save of fewer shards leaves the index of an earlier one behind.
    whole = models.from_pretrained(write(tmp_path / "whole"))
    place = shutil.copytree(tmp_path / "whole", tmp_path / "both")
    (place / "model.safetensors.index.json").write_text(json.dumps(STALE))
    if shards != "gone":
        older = {name: np.zeros_like(value) for name, value in TENSORS.items()}
        safetensors.numpy.save_file(older, place / "model-00001-of-00001.safetensors")
    if shards == "damaged":
        (place / "model.safetensors.index.json").write_text("{")
    with pytest.warns(UserWarning, match=r"holds both model\.safetensors, which is read, and"):
        assert_same(models.from_pretrained(place), whole)
