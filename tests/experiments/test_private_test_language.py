"""Scores of language models on private records: labels' words as on a public test set, answers and texts by mean losses."""

import json
import math
import shutil

import numpy as np
import pytest

from dplora_jax import losses
from dplora_jax.federation import held_out
from dplora_jax.finetuning import dealing, setup
from dplora_jax.privacy import secrets
from experiments import cli, ledger
from tests.conftest import GOLDEN, WORDS, write_tokenizer
from tests.experiments.small_runs import fit, lines_of

pytestmark = pytest.mark.usefixtures("quick_compile")
NOUNS, VERBS = WORDS[5:9], WORDS[9:13]
KINDS = {
    "labels": ("--text_column=words", "--label_column=way", f"--labels={','.join(VERBS)}"),
    "answers": ("--prompt_column=words", "--answer_column=way"),
    "text": ("--text_column=words",),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A golden Llama of two layers with the tiny tokenizer beside it."""
    place = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(GOLDEN / "variants/llama_mqa", place)
    write_tokenizer(place)
    return place


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    drawn = [(NOUNS[rng.integers(4)], VERBS[rng.integers(4)], WORDS[rng.integers(13, 20)]) for _ in range(40)]
    return [json.dumps({"words": f"{noun} {word}", "way": verb}) for noun, verb, word in drawn]


@pytest.fixture
def flags(base, rows, tmp_path):
    """The flags of a run that tells exact scores, of a table without a public test set."""
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.jsonl").write_text("\n".join(rows) + "\n")
    return lambda kind, *more: [
        f"--model={base}", "--dataset=jsonl", f"--data_dir={tmp_path / 'table'}", "--max_length=12", "--clients=2", "--rounds=2",
        "--expected_batch_size=8", "--rank=2", "--trust=none", "--client_lr=0.3", "--eval_every=1", "--generate=0", "--seed=5",
        "--private_test=0.3", "--last_layers=1", f"--workdir={tmp_path / 'run'}", *KINDS[kind], *more,
    ]  # fmt: skip


def kept_back(arguments):
    """(the prepared job, {client: Part}) of a seeded run."""
    job = setup.prepare(cli.parse(arguments, lambda _: None))
    return job, held_out.split(job.federation.config, job.shards, secrets.from_seed(5, 2))[1].parts


def test_labels_words_are_scored_as_on_a_public_test_set(flags, tmp_path):
    """What is kept back, once given as a public test set too."""
    arguments = flags("labels")
    _, parts = kept_back(arguments)
    corpus, places = dealing.load(cli.parse(arguments, lambda _: None))
    numbers = [places[k][place] for k, part in parts.items() for place in part.places]
    public = [{"words": corpus.train.texts[i], "way": VERBS[corpus.train.labels[i]]} for i in numbers]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in public))
    fit([*arguments, f"--test_data={tmp_path / 'test.jsonl'}"])
    for line in lines_of(tmp_path / "run" / "metrics.jsonl"):
        assert line["private_accuracy"] == pytest.approx(line["accuracy"])
        assert line["private_macro_f1"] == pytest.approx(line["macro_f1"])


@pytest.mark.parametrize("kind", ["answers", pytest.param("text", marks=pytest.mark.slow)])
def test_answers_and_texts_are_scored_by_the_mean_over_units_of_their_mean_losses(flags, tmp_path, kind):
    job, parts = kept_back(flags(kind))
    model, params = job.federation.model, job.federation.params
    adapter = job.federation.prepare(job.shards).adapter
    most = math.log(model.config.vocab_size)
    found = [losses.language_model(model, params)(adapter, part.rows) for part in parts.values()]
    mean = np.minimum(np.concatenate(found), most).mean()
    fit(flags(kind))
    first, *_, last = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert first["private_perplexity"] == pytest.approx(math.exp(mean), rel=1e-3)
    assert last["private_perplexity_low"] < last["private_perplexity"] < last["private_perplexity_high"]
    assert not {"perplexity", "token_f1"} & {*last}
    assert ledger.main(["verify", str(tmp_path / "run")]) == 0
