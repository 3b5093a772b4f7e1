"""A golden classifier's checkpoint, and how to write it with other tensors or other options."""

import json

import jax
import numpy as np
import safetensors.numpy

from tests.conftest import GOLDEN

CLASSIFIER = GOLDEN / "bert_tiny_classifier"
TENSORS = safetensors.numpy.load_file(CLASSIFIER / "model.safetensors")
CONFIG = json.loads((CLASSIFIER / "config.json").read_text())


def write(directory, tensors=TENSORS, **changes):
    """A checkpoint in `directory` with other tensors or other options; None removes an option."""
    directory.mkdir(exist_ok=True)
    config = {name: value for name, value in (CONFIG | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def assert_same(left, right):
    assert left[0] == right[0]
    jax.tree.map(np.testing.assert_array_equal, left[1], right[1])
