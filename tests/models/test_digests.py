"""A model's files are told by their digests, and what the packages carry is held against what is pinned."""

import importlib.util

import numpy as np
import pytest
import safetensors.numpy

from dplora_jax import models
from dplora_jax.errors import InputError
from dplora_jax.models import digests, pretrained
from tests.conftest import write_tokenizer
from tests.models.checkpoints import TENSORS, write


def test_the_files_of_a_model_are_told_by_their_digests(tmp_path):
    folder = write(tmp_path / "model")
    write_tokenizer(folder)
    (folder / "README.md").write_text("decides nothing")
    found = models.file_digests(folder)
    assert set(found) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    safetensors.numpy.save_file(TENSORS | {"classifier.bias": np.ones(3, np.float32)}, folder / "model.safetensors")
    changed = models.file_digests(folder)
    assert {name for name in found if found[name] != changed[name]} == {"model.safetensors"}
    for call in (models.file_digests, models.from_pretrained):
        (folder / "model.safetensors").unlink(missing_ok=True)
        with pytest.raises(InputError, match="holds no model"):
            call(folder)


def test_a_packages_model_that_is_another_is_warned_of_with_both_digests(tmp_path, monkeypatch, recwarn):
    package = tmp_path / "bank_bert_carrier"
    package.mkdir()
    (package / "__init__.py").touch()
    folder = write(package / "model")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(pretrained.PACKAGES, "bank", ("bank_bert_carrier", "model"))
    (found,) = {models.file_digests(folder)["model.safetensors"]}
    monkeypatch.setitem(digests.PINNED, "bank", {"model.safetensors": found})
    assert pretrained.locate("bank") == folder
    assert not recwarn.list
    monkeypatch.setitem(digests.PINNED, "bank", {"model.safetensors": "0" * 64, "tokenizer.json": "1" * 64})
    assert pretrained.locate("bank") == folder
    weights, tokenizer = (str(warning.message) for warning in recwarn.list)
    assert str(folder / "model.safetensors") in weights
    assert found in weights
    assert "0" * 64 in weights
    assert "tokenizer.json" in tokenizer
    assert "no such file" in tokenizer


@pytest.mark.parametrize("name", digests.PINNED)
def test_what_an_installed_package_carries_is_what_is_pinned(name, recwarn):
    if importlib.util.find_spec(pretrained.PACKAGES[name][0]) is None:
        pytest.skip("not installed")
    place = pretrained.locate(name)
    assert not recwarn.list
    assert digests.PINNED[name].items() <= models.file_digests(place).items()
