"""Tasks as rows become questions, and a person's own tables of each kind."""

import json

import numpy as np
import pytest

from dplora_jax.data import demos, sources, tasks
from dplora_jax.data.records import Records
from dplora_jax.data.sources import Source, benchmark, load
from dplora_jax.errors import InputError, Refused


def lines(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_scores_of_fiqa_and_names_of_nwgi_become_fingpts_three_classes():
    fiqa, nwgi = tasks.TASKS["fiqa_sa"].read, tasks.TASKS["nwgi"].read
    assert [fiqa(x) for x in (-0.2, "-0.1", 0.0, 0.0999, 0.1, float("nan"), None)] == [
        "negative", "neutral", "neutral", "neutral", "positive", "", "",
    ]  # fmt: skip
    assert [nwgi(x) for x in ("moderately negative", "mildly negative", "Neutral", "mildly positive", "strong positive")] == [
        "negative", "neutral", "neutral", "neutral", "positive",
    ]  # fmt: skip


def test_a_question_without_a_passage_is_asked_alone():
    one = tasks.boolq({"question": "is ice cold?", "answer": "false"})
    assert one == tasks.Asked(("Question: is ice cold?\nAnswer:",) * 2, (" no", " yes"), 0)


def test_winogrande_scores_the_same_end_after_either_beginning():
    one = tasks.winogrande({"sentence": "Ann paid Eve, as _ owed.", "option1": "Ann", "option2": "Eve", "answer": "1"})
    assert one == tasks.Asked(("Ann paid Eve, as Ann", "Ann paid Eve, as Eve"), (" owed.",) * 2, 0)


def test_own_questions_and_answers_need_no_labels(tmp_path):
    lines(tmp_path, "train.jsonl", [{"q": f"q{i}", "a": f"a{i}", "ward": "NS"[i % 2]} for i in range(6)])
    lines(tmp_path, "test.jsonl", [{"q": "q", "a": "a"}])
    source = Source("jsonl", str(tmp_path), prompt_column="q", answer_column="a", group_column="ward")
    corpus = load(source)
    assert corpus.task.kind == tasks.ANSWERS
    assert corpus.label_names == ()
    assert corpus.train.answers[4] == "a4"
    assert corpus.train.groups == ("N", "S") * 3
    assert tasks.asked(corpus.task, corpus.test) == [tasks.Asked(("Question: q\nAnswer:",), (" a",))]
    assert tasks.asked(corpus.task, corpus.test, chat=True) == [tasks.Asked(("q",), ("a",))]


def test_any_text_file_is_a_record_a_line(tmp_path):
    (tmp_path / "train.txt").write_text("one\n\ntwo\n   \nthree\n")
    (tmp_path / "test.txt").write_text("four\n")
    corpus = load(Source("text", str(tmp_path)))
    assert corpus.train.texts == ("one", "two", "three")
    assert corpus.task.kind == tasks.TEXT


def test_a_part_of_the_records_keeps_texts_answers_and_groups_together(tmp_path):
    lines(tmp_path, "train.jsonl", [{"q": f"q{i}", "a": f"a{i}", "ward": f"w{i}"} for i in range(20)])
    lines(tmp_path, "test.jsonl", [{"q": f"t{i}", "a": f"u{i}"} for i in range(9)])
    options = {"prompt_column": "q", "answer_column": "a", "group_column": "ward"}
    corpus = load(Source("jsonl", str(tmp_path), train_records=7, test_records=4, **options))
    assert (len(corpus.train.texts), len(corpus.test.texts), len(corpus.train.labels)) == (7, 4, 7)
    for text, answer, group in zip(corpus.train.texts, corpus.train.answers, corpus.train.groups, strict=True):
        assert text[1:] == answer[1:] == group[1:]
    other = load(Source("jsonl", str(tmp_path), train_records=7, split_seed=1, **options))
    assert set(other.train.texts) != set(corpus.train.texts)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt_column": "q"}, "needs `answer_column`"),
        ({"prompt_column": "q", "answer_column": "a", "label_column": "l"}, "give one pair"),
        ({"label_column": "l"}, "needs `text_column`"),
        ({}, "needs `text_column`"),
    ],
)
def test_columns_that_make_no_task_are_one_sentence(options, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        load(Source("jsonl", str(tmp_path), **options))


def test_wikitexts_headings_and_blank_lines_are_no_records(tmp_path):
    lines(
        tmp_path,
        "valid.jsonl",
        [{"text": t} for t in ("", " = Title = \n", " A line . \n", " = = Part = = \n", " B . ")],
    )
    lines(tmp_path, "test.jsonl", [{"text": " C . "}])
    corpus = load(Source("wikitext2", str(tmp_path)))
    assert (corpus.train.texts, corpus.test.texts) == ((" A line . \n", " B . "), (" C . ",))


def test_choices_are_to_evaluate_on_and_not_to_train_on(tmp_path):
    rows = [{"goal": f"g{i}", "sol1": "x", "sol2": "y", "label": i % 2} for i in range(8)]
    lines(tmp_path, "validation.jsonl", rows)
    assert [one.right for one in benchmark("piqa", str(tmp_path))] == [0, 1] * 4
    some = benchmark("piqa", str(tmp_path), 3, seed=1)
    assert len(some) == 3
    assert some == benchmark("piqa", str(tmp_path), 3, seed=1)
    with pytest.raises(InputError, match="only to evaluate on"):
        load(Source("piqa", str(tmp_path)))
    with pytest.raises(InputError, match="no column 'sentence'"):
        benchmark("winogrande", str(tmp_path))


def test_right_answers_that_are_kept_back_are_refused_and_validation_comes_first(tmp_path):
    hidden = [{"goal": "g", "sol1": "x", "sol2": "y", "label": -1}]
    lines(tmp_path, "test.jsonl", hidden)
    with pytest.raises(InputError, match="does not tell the right answer of 1 rows"):
        benchmark("piqa", str(tmp_path))
    lines(tmp_path, "validation.jsonl", [hidden[0] | {"label": 1}])
    assert benchmark("piqa", str(tmp_path))[0].right == 1
    rows = [{"sentence": "a _ b", "option1": "x", "option2": "y", "answer": ""}]
    (tmp_path / "w").mkdir()
    lines(tmp_path / "w", "validation.jsonl", rows)
    with pytest.raises(InputError, match="does not tell"):
        benchmark("winogrande", str(tmp_path / "w"))


def test_public_questions_without_an_answer_are_left_out_and_whole_questions_are_held_out(tmp_path):
    rows = [{"question": f"q{i // 3}", "answer": f"a{i}"} for i in range(60)] + [{"question": "q", "answer": None}]
    lines(tmp_path, "train.jsonl", rows)
    corpus = load(Source("medquad", str(tmp_path), test_fraction=0.2))
    assert len(corpus.train.texts) + len(corpus.test.texts) == 60
    assert not set(corpus.train.texts) & set(corpus.test.texts)
    assert 12 <= len(corpus.test.texts) <= 15


def test_a_task_that_the_hub_lacks_asks_for_a_folder():
    with pytest.raises(InputError, match="mediqa_ans is not on the hub"):
        benchmark("mediqa_ans", None)


@pytest.mark.parametrize("name", ["medical_demo", "general_demo"])
def test_demos_are_synthetic_and_test_what_the_training_does_not_tell(name):
    corpus = load(Source(name))
    assert corpus.synthetic
    assert "synthetic" in corpus.description
    assert len(set(corpus.train.texts)) == len(corpus.train.texts) >= 1000
    subjects = lambda of: {text.split(" is a ")[0] if name == "general_demo" else text for text in of.texts}  # noqa: E731
    assert not subjects(corpus.train) & subjects(corpus.test)
    assert load(Source(name, seed=1)).train.texts != corpus.train.texts
    assert corpus.train.texts == demos.load(name, 0).train.texts
    assert name in sources.DATASETS


def of(*texts, answers=None):
    return Records(texts, np.ones(len(texts), np.int32), None, answers)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("financial_phrasebank", [{"sentence": f"s{i}", "label": i % 3} for i in range(20)]),
        ("medquad", [{"question": f"s{i}", "answer": "other words"} for i in range(20)]),
        ("wikitext2", [{"text": f"s{i} \n"} for i in range(20)]),
        ("piqa", [{"goal": f"s{i}", "sol1": "x", "sol2": "y", "label": 0} for i in range(20)]),
    ],
)
def test_a_benchmark_that_holds_the_private_texts_is_refused_whatever_else_stands_beside(name, table, tmp_path):
    """Metrics on private records would be exact statistics of them: other numbers of labels, or another kind, change nothing."""
    lines(tmp_path, "validation.jsonl", table)
    held = [f"s{i}" for i in range(20)]
    for whole in ([of(*held)], [of("s0", "s1", "s1"), of("s2")]):
        with pytest.raises(InputError, match=f"benchmarks={name} is refused as a public test set"):
            benchmark(name, str(tmp_path), private=whole)
    with pytest.raises(Refused) as caught:
        benchmark(name, str(tmp_path), private=[of("another"), of(*held[:8], "s1")])
    assert "every training record of a client" in caught.value.reason
    assert "client" not in str(caught.value)
    few = [of(*held[:7]), of(*held, "another")]
    assert len(benchmark(name, str(tmp_path), private=few)) == 20


def test_questions_alone_are_no_copy_where_the_answers_are_ones_own(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(20)]
    lines(tmp_path, "test.jsonl", rows)
    questions, answers = zip(*((row["question"], row["answer"]) for row in rows[:9]), strict=True)
    with pytest.raises(InputError, match="is refused as a public test set"):
        benchmark("medquad", str(tmp_path), private=[of(*questions, answers=answers)])
    own = [of(*questions, answers=("mine",) * 9), of(*("q",) * 9, answers=answers)]
    for one in own:
        assert len(benchmark("medquad", str(tmp_path), private=[one])) == 20
