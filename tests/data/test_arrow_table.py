"""Parquet: strings, what becomes one, and the names of labels."""

import datetime
import decimal
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dplora_jax.data import arrow_table
from dplora_jax.data.cells import NoText, UnreadableError
from dplora_jax.data.sources import Source, load
from dplora_jax.errors import InputError


def written(table, **options):
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    file.seek(0)
    return file


def read(table, wanted=("text",), every=False):
    return arrow_table.read(written(table, row_group_size=2), wanted, every)[1]


def with_classes(labels, names, kind="ClassLabel"):
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": names, "_type": kind}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table({"text": [f"t{i}" for i in range(len(labels))], "label": labels}).replace_schema_metadata(metadata)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_strings_of_every_kind_are_as_they_are(kind):
    cells = ["007", "2023-01-05", None, "NA", "4.0"]
    plain = pa.array(cells)
    array = plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain.cast(kind)
    assert read(pa.table({"text": array})) == {"text": cells}


def test_what_is_written_in_one_way_only_is_a_string_and_what_is_not_stays():
    table = pa.table(
        {
            "whole": pa.array([2**63, None], pa.uint64()), "true": [True, False], "day": [datetime.date(2023, 1, 5), None],
            "codes": pa.array([7, 7]).dictionary_encode(), "real": [4.0, None], "sum": [decimal.Decimal("4.00"), None],
            "time": pa.array([2**62, 1], pa.timestamp("ms")), "bytes": [b"x", None], "list": [["x"], None],
        }
    )  # fmt: skip
    assert read(table, every=True) == {
        "whole": [str(2**63), None], "true": ["true", "false"], "day": ["2023-01-05", None], "codes": ["7", "7"],
        "real": [4.0, None], "sum": [decimal.Decimal("4.00"), None], "time": [NoText("timestamp[ms]")] * 2,
        "bytes": [NoText("binary")] * 2, "list": [["x"], None],
    }  # fmt: skip


def test_the_names_of_a_class_label_are_in_the_schema():
    assert read(with_classes([1, 0, -1, None], ["bad", "good"]), ("label",)) == {"label": ["good", "bad", None, None]}
    assert read(with_classes([1, 0], ["bad", "good"], "Value"), ("label",)) == {"label": ["1", "0"]}
    assert read(with_classes(["1", "0"], ["bad", "good"]), ("label",)) == {"label": ["1", "0"]}
    with pytest.raises(UnreadableError, match="beyond the names"):
        read(with_classes([2], ["bad", "good"]), ("label",))
    for metadata in ("{", "{}", '{"info": {"features": {"label": 5}}}'):
        table = pa.table({"label": [1]}).replace_schema_metadata({"huggingface": metadata})
        assert read(table, ("label",)) == {"label": ["1"]}


def test_a_table_that_datasets_wrote_trains_by_its_labels_names(tmp_path):
    pq.write_table(with_classes([1, 0, 1], ["bad", "good"]), tmp_path / "train.parquet")
    corpus = load(Source("parquet", str(tmp_path), None, "text", "label", labels=("good", "bad")), need_test=False)
    assert corpus.train.labels.tolist() == [0, 1, 0]


def test_columns_are_found_by_their_whole_name_and_twice_is_refused():
    table = pa.table([["a"], ["b"], [{"body": "c"}]], names=["text", "text.body", "nested"])
    assert read(table, ("text.body",)) == {"text.body": ["b"]}
    assert read(table, ("nested.body", "absent")) == {}
    twice = pa.table([["a"], ["b"], ["c"]], names=["text", "note", "note"])
    assert read(twice) == {"text": ["a"]}
    with pytest.raises(UnreadableError, match="two columns named 'note'"):
        read(twice, ("note",))


@pytest.mark.parametrize("role", ["text", "label", "group", "answer"])
def test_a_kind_without_one_way_to_write_it_is_refused_by_its_name(role, tmp_path):
    strings = pa.array(["a", "b"])
    columns = dict.fromkeys(("text", "label", "group", "answer"), strings)
    columns |= {role: pa.array([1, 2], pa.timestamp("ms"))}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    kind = {"label_column": "label", "labels": ("a", "b")}
    pair = {"text_column": "text", **kind} if role != "answer" else {"prompt_column": "text", "answer_column": "answer"}
    with pytest.raises(InputError, match=rf"column '{role}' that are not text \(timestamp\[ms\]\)"):
        load(Source("parquet", str(tmp_path), group_column="group", **pair), need_test=False)


def test_text_that_is_not_utf_8_is_one_sentence_without_it(tmp_path):
    broken = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"sec\xe9")])
    pq.write_table(pa.table({"text": broken, "label": ["a"]}), tmp_path / "train.parquet")
    with pytest.raises(InputError, match="text that is not UTF-8") as caught:
        load(Source("parquet", str(tmp_path), None, "text", "label", labels=("a", "b")), need_test=False)
    assert "sec" not in str(caught.value)
    assert caught.value.__context__ is None
