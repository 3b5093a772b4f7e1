"""Where a model may lie: an installed package that carries one, or the hub; and what is said where it is not there."""

import sys

import jax
import numpy as np
import pytest

from dplora_jax import models
from dplora_jax.models import pretrained
from tests.conftest import write_tokenizer
from tests.hub_stand_in import UNREACHABLE, run_python, stand_in
from tests.models.checkpoints import CLASSIFIER, assert_same, write

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def reference():
    return models.from_pretrained(CLASSIFIER)


def test_a_package_that_carries_a_model_is_found_but_never_imported(reference, tmp_path, monkeypatch):
    package = tmp_path / "bank_bert_carrier"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write(package / "model")
    monkeypatch.syspath_prepend(tmp_path)
    assert_same(models.from_pretrained("bank-bert-carrier"), reference)
    assert "bank_bert_carrier" not in sys.modules


def test_an_unreachable_hub_is_one_sentence_with_the_ways_out(tmp_path):
    code = """
    from dplora_jax import models
    from dplora_jax.errors import InputError
    for load in (models.from_pretrained, models.load_tokenizer):
        try:
            load("someone/tiny-bert")
        except InputError as error:
            print(error)
    """
    done = run_python(code, HF_HOME=tmp_path, HF_ENDPOINT=UNREACHABLE, TRANSFORMERS_VERBOSITY="error")
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        assert "'someone/tiny-bert'" in line
        assert "a directory with config.json and model.safetensors" in line
        assert line.endswith(".")


def test_a_hub_serves_model_and_tokenizer(reference, tmp_path):
    write(tmp_path / "served")
    write_tokenizer(tmp_path / "served")
    (tmp_path / "served" / "README.md").write_text("of no concern")
    (tmp_path / "served" / "pytorch_model.bin").write_text("of no concern")
    code = """
    import os
    import jax, numpy
    from dplora_jax import models
    model, params = models.from_pretrained("someone/tiny-bert")
    print(sum(float(numpy.square(leaf).sum()) for leaf in jax.tree.leaves(params)))
    print(models.load_tokenizer("someone/tiny-bert")("profit rose").input_ids)
    print(sorted({file for _, _, files in os.walk(os.environ["HF_HOME"]) for file in files if "." in file}))
    """
    files = {path.name: path.read_bytes() for path in (tmp_path / "served").iterdir()}
    with stand_in("models", {"someone/tiny-bert": (files, "main")}) as endpoint:
        done = run_python(code, HF_HOME=tmp_path / "home", HF_ENDPOINT=endpoint, JAX_PLATFORMS="cpu")
    total, ids, cached = done.stdout.splitlines() or [done.stderr, "", ""]
    expected = sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(reference[1]))
    assert float(total) == pytest.approx(expected)
    assert ids == "[2, 5, 9, 3]"
    assert "model.safetensors" in cached
    assert "pytorch_model.bin" not in cached
    assert "README.md" not in cached


def test_the_hub_says_that_a_model_does_not_exist(tmp_path):
    code = """
    from dplora_jax import models
    from dplora_jax.errors import InputError
    try:
        models.from_pretrained("someone/else")
    except InputError as error:
        print(error)
    """
    with stand_in("models", {}) as endpoint:
        done = run_python(code, HF_HOME=tmp_path, HF_ENDPOINT=endpoint)
    assert len(done.stdout.splitlines()) == 1, done.stderr
    assert "RepositoryNotFoundError" in done.stdout


def test_a_models_public_name_is_never_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "some").parent)
    write(tmp_path / "some" / "model")
    assert pretrained.hub_id("all-MiniLM-L6-v2") == "sentence-transformers/all-MiniLM-L6-v2"
    assert pretrained.hub_id("someone/tiny-bert") == "someone/tiny-bert"
    assert [pretrained.hub_id(path) for path in ("some/model", "some", tmp_path, "/etc/x", "m.gguf")] == [None] * 5
