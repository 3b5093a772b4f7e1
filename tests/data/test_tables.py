"""Reading the very file that was found, whatever its path, its compression or its encoding."""

import codecs
import errno
import gzip
import json

import pytest

from dplora_jax.data import tables
from dplora_jax.data.sources import Source, benchmark, load
from dplora_jax.data.tables import TextFormat, read_file
from dplora_jax.errors import InputError, StorageError

WANTED = ("text", "label")
NAMES = [
    "bank?",
    "bank[12]",
    "b*",
    "{a,b}",
    "100%",
    "#1",
    "a:b",
    "x@y",
    "zip::z",
    "hf:",
    "two words",
    "银行",
    "!c",
    "~",
    "a\nb",
    "-",
]


def csv_text(first):
    return f"text,label\n{first},good\n"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path, **form):
    return read_file(path, WANTED, form=TextFormat(**form)).columns["text"]


def said(path, kind=InputError, **form):
    with pytest.raises(kind) as caught:
        read_file(path, WANTED, form=TextFormat(**form))
    assert caught.value.__context__ is None
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_no_pattern(name, tmp_path):
    for neighbour in ("bank1", "bank2", "ba", "a", "b", "100", "xy", "z", "c"):
        write(tmp_path / neighbour / "train.csv", csv_text("another's"))
        write(tmp_path / f"{neighbour}.csv", csv_text("another's"))
    assert texts(write(tmp_path / name / "train.csv", csv_text("own"))) == ["own"]
    held = write(tmp_path / f"{name}.csv", csv_text("public"))
    options = {"text_column": "text", "label_column": "label", "labels": ("good", "bad"), "test_data": str(held)}
    corpus = load(Source("csv", str(tmp_path / name), **options))
    assert (corpus.train.texts, corpus.test.texts) == (("own",), ("public",))
    row = {"goal": "g", "sol1": name, "sol2": "y", "label": 0}
    write(tmp_path / name / "piqa" / "validation.jsonl", json.dumps(row))
    assert [one.answers[0] for one in benchmark("piqa", str(tmp_path / name / "piqa"))] == [f" {name}"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", csv_text("one")),
        ("train.tsv", "text\tlabel\none\tgood\n"),
        ("train.jsonl", '{"text": "one", "label": "good"}'),
        ("train.json", '[{"text": "one", "label": "good"}]'),
        ("train.txt", "one\n"),
        ("train.CSV", csv_text("one")),
    ],
)
def test_every_kind_of_text_is_read_as_it_is_and_compressed(name, content, tmp_path):
    assert texts(write(tmp_path / name, content)) == ["one"]
    assert texts(write(tmp_path / f"{name}.gz", gzip.compress(content.encode()))) == ["one"]
    assert texts(write(tmp_path / "unsaid" / name, gzip.compress(content.encode()))) == ["one"]


def test_a_line_of_json_ends_at_a_newline_alone(tmp_path):
    assert texts(write(tmp_path / "train.jsonl", '{"text": "a\rb"}\r\n{"text": "c\u2028d"}\n')) == ["a\rb", "c\u2028d"]
    assert texts(write(tmp_path / "train.txt", "a\rb\r\nc\u2028d\n")) == ["a", "b", "c\u2028d"]


def test_a_compressed_table_is_found_and_a_second_one_refused(tmp_path):
    path = write(tmp_path / "train.csv.gz", gzip.compress(csv_text("one").encode()))
    assert tables.find(str(tmp_path), "train", (".csv", ".tsv")) == path
    assert (
        tables.stem_of(path)
        == tables.stem_of(tmp_path / "train.parquet")
        == tables.stem_of(tmp_path / "train.x")
        == "train"
    )
    write(tmp_path / "train.tsv", "text\n")
    with pytest.raises(InputError, match="more than one train table"):
        tables.find(str(tmp_path), "train", (".csv", ".tsv"))


def test_a_compressed_training_table_is_no_test_set_either(tmp_path):
    path = write(tmp_path / "a" / "train.csv.gz", gzip.compress(csv_text("one").encode()))
    write(tmp_path / "train.csv", csv_text("two"))
    with pytest.raises(InputError, match="private"):
        load(Source("csv", str(tmp_path), str(path), "text", "label", labels=("good", "bad")))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_obeyed_whatever_the_flag_says(encoding, tmp_path):
    path = write(tmp_path / "train.csv", csv_text("é").encode(encoding))
    assert texts(path) == texts(path, encoding="cp1252") == texts(path, encoding=encoding) == ["é"]
    big = write(tmp_path / "big.csv", codecs.BOM_UTF16_BE + csv_text("é").encode("utf-16-be"))
    assert texts(big) == ["é"]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "gb18030", "iso2022_jp", "utf-7"])
def test_the_encoding_that_is_given_is_that_of_files_that_are_not_utf_8(encoding, tmp_path):
    text = {"cp1252": "café", "utf-7": "café"}.get(encoding, "日本")
    path = write(tmp_path / "train.csv", csv_text(text).encode(encoding))
    assert texts(path, encoding=encoding) == [text]
    if encoding in ("cp1252", "gb18030"):  # a public test set in UTF-8 stands beside it: no letter of it is garbled
        assert texts(write(tmp_path / "test.csv", csv_text("déjà")), encoding=encoding) == ["déjà"]
    lines = write(tmp_path / "train.jsonl", json.dumps({"text": text}, ensure_ascii=False).encode(encoding))
    assert texts(lines, encoding=encoding) == [text]


def test_bytes_of_another_encoding_name_their_line_and_the_flag_and_no_letter(tmp_path):
    path = write(tmp_path / "train.csv", csv_text("plain\nx,good\nsecr\xe9t").encode("cp1252"))
    assert "is not utf-8 at line 4; give its `encoding` (cp1252" in said(path)
    assert "secr" not in said(path)
    assert "is not ascii at line 4; give another `encoding`, or" in said(path, encoding="ascii")
    bare = write(tmp_path / "bare.csv", csv_text("one").encode("utf-16-le"))
    assert "give encoding=utf-16-le" in said(bare)
    assert "has no byte-order mark; give encoding=utf-16-le or encoding=utf-16-be" in said(bare, encoding="utf-16")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("train.csv", b"PK\x03\x04\x14\x00", "a zip archive or an Excel workbook"),
        ("train.csv", b"\x28\xb5\x2f\xfd\x04", "compressed by zstd"),
        ("train.jsonl", b"PAR1\x15\x04", "a Parquet file"),
        ("train.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("train.parquet", b"text,label\n", "not begin as a Parquet file"),
        ("train.parquet", b"PAR1\x15\x04", "damaged, or cut off"),
        ("train.csv.gz", gzip.compress(csv_text("one" * 99).encode(), mtime=0)[:-9], "damaged, or cut off"),
        ("train.parquet.gz", b"x", "of no known kind"),
        ("train.csv", b"", "is empty"),
    ],
)
def test_what_is_something_else_than_its_name_says_is_told(name, content, sentence, tmp_path):
    assert sentence in said(write(tmp_path / name, content))


def test_what_the_machine_refuses_is_not_the_tables_fault(tmp_path, monkeypatch):
    path = write(tmp_path / "train.csv", csv_text("one"))

    def refuse(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(type(path), "open", refuse)
    assert f"{path} cannot be read (Stale file handle)" in said(path, kind=StorageError)
    monkeypatch.setattr(type(path), "is_file", refuse)
    with pytest.raises(StorageError, match="cannot be read"):
        tables.find(str(tmp_path), "train", (".csv",))


def test_a_fault_of_the_program_is_not_called_one_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tables.csv_table, "read", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read_file(write(tmp_path / "train.csv", csv_text("one")), WANTED)


@pytest.mark.parametrize(
    "flag", [{"encoding": "klingon"}, {"encoding": "base64"}, {"separator": "ab"}, {"separator": '"'}]
)
def test_a_flag_that_means_nothing_is_one_sentence(flag):
    with pytest.raises(InputError, match=f"{next(iter(flag))}="):
        tables.text_format(**({"encoding": None, "separator": None} | flag))
    assert tables.text_format(None, "semicolon").separator == tables.text_format(None, ";").separator == ";"
    assert tables.text_format(None, "tab").separator == tables.text_format(None, r"\t").separator == "\t"
