"""Public records to train on: files like the run's own table and public tasks' tables, as the run's own records."""

import numpy as np
import pytest

from dplora_jax.data import public_table, sources, tasks
from dplora_jax.errors import InputError
from dplora_jax.finetuning import dealing

OWN = sources.Source("csv", text_column="body", label_column="class")
TASK = tasks.own_table(tasks.LABELS, ("negative", "positive", "neutral"))
RENAMED = {"bearish": "negative", "bullish": "positive"}


@pytest.fixture
def twitter(tmp_path):
    folder = tmp_path / "twitter"
    folder.mkdir()
    (folder / "train.csv").write_text("text,label\nshares fall,0\nshares rise,1\nboard meets,2\n")
    (folder / "validation.csv").write_text("text,label\nnot these,2\n")
    return f"twitter_financial_news_sentiment={folder}"


def test_a_tasks_training_table_has_the_runs_labels(twitter):
    found = public_table.read(twitter, OWN, TASK, RENAMED)
    assert found.texts == ("shares fall", "shares rise", "board meets")
    np.testing.assert_array_equal(found.labels, [0, 1, 2])
    assert public_table.name(twitter) == "twitter_financial_news_sentiment"


def test_two_tasks_number_their_labels_apart(twitter):
    """financial_phrasebank's neutral is 1, and twitter's is 2."""
    source, task = sources.Source("financial_phrasebank"), tasks.TASKS["financial_phrasebank"]
    np.testing.assert_array_equal(public_table.read(twitter, source, task, RENAMED).labels, [0, 2, 1])


def test_and_the_reverse(tmp_path):
    (tmp_path / "train.csv").write_text("sentence,label\nloss,negative\nnothing,1\ngain,Positive\n")
    source, task = sources.Source("twitter_financial_news_sentiment"), tasks.TASKS["twitter_financial_news_sentiment"]
    renamed = {ours: theirs for theirs, ours in RENAMED.items()}
    found = public_table.read(f"financial_phrasebank={tmp_path}", source, task, renamed)
    np.testing.assert_array_equal(found.labels, [0, 2, 1])


@pytest.mark.parametrize(
    ("name", "content", "source", "task"),
    [
        ("a.csv", "body,class\nshares fall,negative\n", OWN, TASK),
        ("a.jsonl", '{"sentence": "shares fall", "label": 0}\n', sources.Source("financial_phrasebank"), None),
        ("a.csv", "text,label\nshares fall,negative\n", sources.Source("finance_demo"), TASK),
        ("a.txt", "\nshares fall\n", sources.Source("text"), tasks.own_table(tasks.TEXT)),
        ("a.csv", "question,answer\nshares fall,why\nempty,\n", sources.Source("medquad"), None),
    ],
)
def test_a_file_has_the_columns_of_the_runs_own_table(tmp_path, name, content, source, task):
    (tmp_path / name).write_text(content)
    found = public_table.read(str(tmp_path / name), source, task or tasks.TASKS[source.dataset], {})
    assert (found.texts, found.labels.tolist()) == (("shares fall",), [0])
    assert found.answers == (("why",) if source.dataset == "medquad" else None)
    assert public_table.name(str(tmp_path / name)) == name


def test_instructions_are_put_together_as_the_runs_own(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "Say", "input": "it", "output": "so"}\n')
    source = sources.Source("alpaca_gpt4")
    found = public_table.read(str(tmp_path / "a.jsonl"), source, tasks.TASKS["alpaca_gpt4"], {})
    assert (found.texts, found.answers) == (("Say it",), ("so",))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("medquad={folder}", "has prompts with answers, and dataset=csv has texts with labels"),
        ("piqa={folder}", "choices"),
        ("elsewhere={folder}", "is no file, and no task"),
        ("financial_phrasebank={folder}", "no table to train on"),
        ("financial_phrasebank={folder}/none", "is not a folder"),
        ("{folder}/other.csv", "has no column 'class'; its columns are body, mood"),
        ("{folder}/strange.csv", "labels buoyant, and the run's are negative, positive, neutral"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, given, words):
    (tmp_path / "other.csv").write_text("body,mood\nshares fall,negative\n")
    (tmp_path / "strange.csv").write_text("body,class\nshares fall,buoyant\n")
    with pytest.raises(InputError, match=words) as caught:
        public_table.read(given.format(folder=tmp_path), OWN, TASK, {})
    assert "\n" not in str(caught.value)


def test_a_source_of_a_run_reads_it(tmp_path):
    from experiments import cli

    (tmp_path / "a.csv").write_text("body;class\ncafé;good\n", encoding="cp1252")
    flags = ["--dataset=csv", "--text_column=body", "--label_column=class", "--encoding=cp1252", "--separator=;"]
    config = cli.parse([*flags, "--epsilon=8"], lambda _: None)
    task = tasks.own_table(tasks.LABELS, ("good", "bad"))
    assert public_table.read(str(tmp_path / "a.csv"), dealing.source_of(config), task, {}).texts == ("café",)
