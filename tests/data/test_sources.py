"""Loading records: the demo, benchmarks from files, and a person's own tables."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from dplora_jax.data.sources import Source, load
from dplora_jax.errors import InputError
from tests.hub_stand_in import run_python

MARKER = "zebra-crossing-secret"


def write(folder: Path, name: str, rows: list[dict]) -> Path:
    """Writes rows as CSV, JSON lines or Parquet, by the name's suffix."""
    path = folder / name
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        path.write_text("".join(",".join(str(cell) for cell in line) + "\n" for line in lines))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def own(folder: Path, dataset: str = "csv", **more) -> Source:
    return Source(dataset, data_dir=str(folder), text_column="words", label_column="mood", **more)


def rows(labels, start: int = 0) -> list[dict]:
    return [{"words": f"text {start + i}", "mood": mood, "bank": "AB"[i % 2]} for i, mood in enumerate(labels)]


def test_demo_says_that_it_is_synthetic_and_follows_its_seed():
    corpus = load(Source("finance_demo"))
    assert corpus.synthetic
    assert "synthetic" in corpus.description
    assert corpus.label_names == ("negative", "neutral", "positive")
    assert corpus.train.labels.dtype == np.int32
    assert len(corpus.train.texts) == len(corpus.train.labels) == 3200
    assert load(Source("finance_demo", seed=1)).train.texts != corpus.train.texts


@pytest.mark.parametrize(
    ("dataset", "suffix"), [("csv", "csv"), ("jsonl", "jsonl"), ("jsonl", "json"), ("parquet", "parquet")]
)
def test_own_table_takes_its_labels_from_the_public_test(tmp_path, dataset, suffix):
    write(tmp_path, f"train.{suffix}", rows([10, 9, 9]))
    write(tmp_path, f"test.{suffix}", rows([9, 10], start=5))
    corpus = load(own(tmp_path, dataset, group_column="bank"))
    assert corpus.label_names == ("9", "10")
    assert corpus.train.labels.tolist() == [1, 0, 0]
    assert corpus.train.texts == ("text 0", "text 1", "text 2")
    assert corpus.train.groups == ("A", "B", "A")
    assert corpus.test.labels.tolist() == [0, 1]
    assert corpus.test.groups is None
    assert not corpus.synthetic


def test_labels_of_any_number_of_digits_are_in_their_order(tmp_path):
    long = "9" * 6000
    write(tmp_path, "train.csv", rows([long]))
    write(tmp_path, "test.csv", rows([long, "10", "9"], start=5))
    assert load(own(tmp_path)).label_names == ("9", "10", long)


def test_labels_flag_gives_names_in_its_order_and_no_test_is_needed_for_training(tmp_path):
    write(tmp_path, "train.jsonl", rows([1.0, 0, "1"]))
    corpus = load(own(tmp_path, "jsonl", labels=("1", "0")), need_test=False)
    assert corpus.test is None
    assert corpus.train.labels.tolist() == [0, 1, 0]


def test_csv_cells_stay_text(tmp_path):
    (tmp_path / "train.csv").write_bytes(b'\xef\xbb\xbfwords,mood\nNA,none\n"a, b",01\nnull,01\n')
    corpus = load(own(tmp_path, labels=("none", "01")), need_test=False)
    assert corpus.train.texts == ("NA", "a, b", "null")
    assert corpus.train.labels.tolist() == [0, 1, 1]


def test_a_training_table_in_any_dress_is_no_test_set(tmp_path):
    """The same file by another name, its rows in another order and kind, or another table named train beside it."""
    train = rows(["up", "down", "up"])
    write(tmp_path, "train.csv", train)
    (tmp_path / "elsewhere").mkdir()
    os.link(tmp_path / "train.csv", tmp_path / "linked.csv")
    (tmp_path / "pointed.csv").symlink_to(tmp_path / "train.csv")
    copy = write(tmp_path / "elsewhere", "copy.jsonl", [*train[::-1], *rows(["down"], start=7)])
    named = write(tmp_path, "train.jsonl", rows(["up", "down"], start=9))
    for path in (tmp_path / "linked.csv", tmp_path / "pointed.csv", copy, named):
        with pytest.raises(InputError, match=r"private|is refused as a public test set"):
            load(own(tmp_path, test_data=str(path)))
    (tmp_path / "test.csv").symlink_to(tmp_path / "train.csv")
    with pytest.raises(InputError, match="private"):
        load(own(tmp_path))
    part = write(tmp_path / "elsewhere", "part.csv", train[:2])  # as a public set with duplicates may
    assert len(load(own(tmp_path, test_data=str(part))).test.texts) == 2


def test_a_benchmarks_training_table_is_no_test_set_either(tmp_path):
    path = write(tmp_path, "train.jsonl", [{"text": f"t{i}", "label": i % 3} for i in range(6)])
    source = Source("twitter_financial_news_sentiment", data_dir=str(tmp_path), test_data=str(path))
    with pytest.raises(InputError, match="private"):
        load(source)


def test_test_data_may_be_of_another_kind_and_serves_benchmarks(tmp_path):
    write(tmp_path, "train.csv", rows(["up", "down"]))
    path = write(tmp_path, "held.jsonl", rows(["up", "down", "up", "up"])[1:])
    assert load(own(tmp_path, test_data=str(path))).test.labels.tolist() == [0, 1, 1]
    write(tmp_path, "validation.jsonl", [{"text": "a", "label": 1}])
    path = write(tmp_path, "mine.jsonl", [{"text": "b", "label": "neutral"}, {"text": "c", "label": 0}])
    folder = tmp_path / "b"
    folder.mkdir()
    write(folder, "validation.jsonl", [{"text": "a", "label": 1}])
    corpus = load(Source("twitter_financial_news_sentiment", data_dir=str(folder), test_data=str(path)))
    assert corpus.train.texts == ("a",)
    assert corpus.test.labels.tolist() == [2, 0]


def test_split_is_disjoint_seeded_and_of_the_asked_size(tmp_path):
    write(tmp_path, "train.jsonl", rows([0, 1] * 50))
    first, again, other = (load(own(tmp_path, "jsonl", test_fraction=0.3, split_seed=s)) for s in (1, 1, 2))
    assert len(first.test.texts) == 30
    assert not set(first.train.texts) & set(first.test.texts)
    assert len(set(first.train.texts + first.test.texts)) == 100
    assert first.test.texts == again.test.texts != other.test.texts
    assert "declared public" in first.description


def test_benchmark_with_one_file_is_split_and_with_a_test_file_is_not(tmp_path):
    table = [{"sentence": f"s{i}", "label": i % 3} for i in range(50)]
    write(tmp_path, "train.jsonl", table)
    source = Source("financial_phrasebank", data_dir=str(tmp_path))
    corpus = load(source)
    assert (len(corpus.train.texts), len(corpus.test.texts)) == (40, 10)
    assert all(label == int(text[1:]) % 3 for text, label in zip(corpus.test.texts, corpus.test.labels, strict=True))
    write(tmp_path, "validation.csv", table[:7])
    corpus = load(source)
    assert (len(corpus.train.texts), len(corpus.test.texts)) == (50, 7)


def malformed(folder: Path, content: bytes, name: str = "train.csv") -> Source:
    (folder / name).write_bytes(content)
    return own(folder, "jsonl" if name.endswith("jsonl") else "csv", labels=("a", "b"))


SECRET = MARKER.encode()
MALFORMED = {
    "empty": (b"", "train.csv", "is empty"),
    "header alone": (b"words,mood\n", "train.csv", "no rows"),
    "long row": (b"words,mood\nx,a\n" + SECRET + b",a,b\n", "train.csv", "3 cells in the row that ends at line 3"),
    "all rows long": (b"words,mood\n" + SECRET + b",x,a\n", "train.csv", "3 cells in the row that ends at line 2"),
    "short row": (b"words,mood\nx,a\n" + SECRET + b"\n", "train.csv", "1 rows with nothing in column 'mood'"),
    "no text": (b"words,mood\n" + SECRET + b",a\n ,b\n", "train.csv", "1 rows with nothing in column 'words'"),
    "open quote": (b'words,mood\n"' + SECRET + b",a\ny,b\n", "train.csv", "a quote in the row that begins at line 2"),
    "latin-1": (b"words,mood\n\xe9" + SECRET + b",a\n", "train.csv", "not utf-8 at line 2; give its `encoding`"),
    "no column": (
        b"words,feeling\n" + SECRET + b",a\n",
        "train.csv",
        "no column 'mood'; it has 2",
    ),
    "no header": (SECRET + b",a\ny,b\n", "train.csv", "no column 'words'; it has 2"),
    "label": (b"words,mood\n" + SECRET + b"," + SECRET + b"\n", "train.csv", "1 rows .* known ones .a, b."),
    "torn json": (
        b'{"words": "' + SECRET + b'", "mood": "a"}\n{"words": "' + SECRET,
        "train.jsonl",
        "not JSON at line 2",
    ),
    "missing key": (b'{"words": "' + SECRET + b'", "mood": "a"}\n{"words": "x"}\n', "train.jsonl", "column 'mood'"),
    "no string": (b'{"words": ["' + SECRET + b'"], "mood": "a"}\n', "train.jsonl", "not text"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_table_is_one_sentence_without_private_text(tmp_path, case, capfd):
    content, name, said = MALFORMED[case]
    with pytest.raises(InputError, match=said) as caught:
        load(malformed(tmp_path, content, name), need_test=False)
    assert "\n" not in str(caught.value)
    assert MARKER not in str(caught.value)
    assert caught.value.__context__ is None
    assert MARKER not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset": "imdb"}, "finance_demo, .*financial_phrasebank, .*parquet"),
        ({"test_fraction": 0.0}, "between 0 and 1"),
        ({"test_fraction": 1.0}, "between 0 and 1"),
        ({"test_fraction": 0.01}, "one part empty"),
        ({"data_dir": None}, "`data_dir`"),
        ({"data_dir": "nowhere"}, "not a folder"),
        ({"text_column": None}, "`text_column`"),
        ({"label_column": None, "labels": ("up", "down")}, "`label_column`"),
        ({"dataset": "parquet"}, "no train.parquet"),
        ({}, "`test_data` .* `test_fraction` .* eval_every=0"),
        ({"test_data": "nowhere.csv"}, "not there"),
        ({"test_data": "nowhere.xlsx"}, "no known kind"),
        ({"test_data": "train"}, "private"),
        ({"test_data": "test", "test_fraction": 0.5}, "drop one"),
        ({"labels": ("up",), "test_data": "test"}, "two or more"),
        ({"labels": ("up", "up"), "test_data": "test"}, "two or more"),
        ({"group_column": "city", "test_data": "test"}, "no column 'city'"),
        ({"dataset": "financial_phrasebank"}, "no column 'words'"),
        ({"dataset": "financial_phrasebank", "labels": ("a", "b")}, "`labels`"),
        ({"dataset": "finance_demo", "data_dir": None, "test_data": "x"}, "`test_data`"),
        ({"dataset": "finance_demo", "data_dir": None, "group_column": "x"}, "partition="),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, change, said):
    table = [{"text": "x", "mood": "up", "words": "y"}, {"text": "x", "mood": "down", "words": "y"}]
    if change.get("dataset") == "financial_phrasebank":
        table = [{"sentence": "x", "label": 1}]
    held = {"train": str(write(tmp_path, "train.csv", table)), "test": str(write(tmp_path, "held.csv", table))}
    change = {k: held.get(v, v) if k == "test_data" else v for k, v in change.items()}
    fields = vars(own(tmp_path)) | change
    with pytest.raises(InputError, match=said) as caught:
        load(Source(**fields))
    assert "\n" not in str(caught.value)


def test_private_labels_are_never_learned_from_training_rows(tmp_path):
    write(tmp_path, "train.csv", rows(["up", "down"]))
    with pytest.raises(InputError, match="`labels`"):
        load(own(tmp_path), need_test=False)


@pytest.mark.parametrize("ending", ["\nx,up\n", '\n"x,up\n'], ids=["read", "malformed"])
def test_the_table_alone_is_opened_and_nothing_is_written(tmp_path, ending):
    """A folder's name is no pattern: its neighbours' tables would be another client's records."""
    home, temp = tmp_path / "home", tmp_path / "temp"
    data, neighbour = tmp_path / "bank?", tmp_path / "bank1"
    for folder in (home, temp, data, neighbour):
        folder.mkdir()
        (folder / "train.csv").write_text(f"words,mood\n{MARKER},down{ending}")
    done = run_python(
        f"""
        import sys
        from dplora_jax.data.sources import Source, load
        from dplora_jax.errors import InputError
        opened = []
        def watch(event, arguments):
            if event == "open" and {str(tmp_path)!r} in str(arguments[0]):
                opened.append(str(arguments[0]))
        sys.addaudithook(watch)
        try:
            load(Source("csv", {str(data)!r}, None, "words", "mood", labels=("up", "down")), need_test=False)
        except InputError:
            pass
        assert opened == [{str(data / "train.csv")!r}], opened
        """,
        HF_HOME=home,
        TMPDIR=temp,
        HOME=home,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4
