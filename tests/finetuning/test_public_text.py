"""What is measured of a base model where no text is public, and what cannot be."""

import shutil

import numpy as np
import pytest

from dplora_jax import evaluation, losses
from dplora_jax.errors import InputError
from dplora_jax.finetuning import setup
from dplora_jax.models import features
from experiments import cli
from tests.conftest import GOLDEN, write_tokenizer
from tests.experiments.public_measures import arguments, labelled_by_words

pytestmark = pytest.mark.usefixtures("quick_compile")
WAYS = {"nothing is measured on": ["--eval_every=0"], "scores are private": ["--private_test=0.2", "--eval_every=1"]}


@pytest.fixture
def words(finance_table, tmp_path):
    """`words(change)`: the flags of a run of label words without a public test set, on private texts that `change` makes."""
    shutil.copytree(GOLDEN / "variants/llama_mqa", tmp_path / "model")
    write_tokenizer(tmp_path / "model")

    def of(change=lambda rows: rows):
        folder = tmp_path / f"table{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "train.csv").write_text(change(labelled_by_words((finance_table / "train.csv").read_text())))
        common = arguments(tmp_path / "model", finance_table, tmp_path)
        return [*common, f"--data_dir={folder}", "--labels=rose,fell", "--max_length=12"]

    return of


@pytest.mark.parametrize("way", WAYS)
def test_without_public_text_words_are_measured_behind_a_prompt_without_one(words, way):
    """So private texts change nothing."""
    changes = (str, lambda rows: rows.replace("profit", "sales"), lambda rows: rows.replace("today", "again"))
    jobs = [setup.prepare(cli.parse([*words(change), *WAYS[way]])) for change in changes]
    bias, *others = (job.federation.params[features.KEY]["bias"] for job in jobs)
    for other in others:
        np.testing.assert_array_equal(other, bias)
    federation, objective = jobs[0].federation, jobs[0].describe.args[1].objective
    reader = losses.reader(objective.loss, federation.model, federation.params)
    ids = np.array([jobs[0].tokenizer("\nLabel:").input_ids], np.int32)
    rows = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    bare = {name: part for name, part in federation.params.items() if name != features.KEY}
    expected = evaluation.label_likelihoods(reader, bare, None, rows)[0]
    np.testing.assert_allclose(bias, expected, atol=1e-5)


def test_a_core_cannot_be_measured_without_public_text(words):
    with pytest.raises(InputError, match="`core` needs a public test set"):
        setup.prepare(cli.parse([*words(), "--core", "--eval_every=0"]))


def test_a_core_cannot_be_measured_on_a_task_without_labels(words, finance_table):
    flags = [flag for flag in words() if not flag.startswith("--label")]
    with pytest.raises(InputError, match="`core` needs a task with labels"):
        setup.prepare(cli.parse([*flags, "--core", f"--test_data={finance_table / 'test.csv'}"]))
