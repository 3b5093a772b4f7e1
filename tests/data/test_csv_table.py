"""CSV: every cell is what stands there."""

import csv
import io

import pytest

from dplora_jax.data import csv_table
from dplora_jax.data.cells import UnreadableError

WANTED = ("text", "label")
WRITTEN = [
    "007",
    "1e5",
    "4.0",
    "2.00",
    "01234.0",
    "NA",
    "null",
    "None",
    "nan",
    "True",
    "-0",
    "9" * 6000,
    " spaced ",
    "2023-01-05",
    "#1",
]


def read(text, wanted=WANTED, every=False, separators=(",",)):
    return csv_table.read(io.StringIO(text, newline=""), wanted, every, separators)[1]


def said(text, wanted=WANTED, every=False, separators=(",",)):
    with pytest.raises(UnreadableError) as caught:
        read(text, wanted, every, separators)
    return str(caught.value)


@pytest.mark.parametrize("cell", WRITTEN)
def test_a_cell_stays_as_it_is_written(cell):
    assert read(f"text,label\n{cell},{cell}\n") == {"text": [cell], "label": [cell]}


def test_quotes_part_nothing_and_are_kept_within():
    found = read('text,label\r\n"a, ""b""\nc;\td",5" nails\r\n\r\nx,\r\nlast\r\n')
    assert found == {"text": ['a, "b"\nc;\td', "x", "last"], "label": ['5" nails', "", None]}


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_lines_end_as_any_machine_ends_them_and_nowhere_else(ending):
    found = read(ending.join(["text,label", "a\u2028b\x0cc,x", ""]))
    assert found == {"text": ["a\u2028b\x0cc"], "label": ["x"]}


@pytest.mark.parametrize(
    "table", [",text,label\n0,one,x\n", "text,label,\none,x,\n", "text,label, \none,x,7\n", ",text,,label,\n,one,,x,\n"]
)
def test_a_column_without_a_name_is_nobodys(table):
    assert read(table) == read(table, every=True) == {"text": ["one"], "label": ["x"]}


def test_a_text_may_be_as_long_as_it_is_and_the_limit_is_left_alone():
    limit, long = 131_072, "word " * 60_000
    csv.field_size_limit(limit)
    assert read(f'text,label\n"{long}",x\n')["text"] == [long]
    assert csv.field_size_limit() == limit


def test_a_column_that_is_there_twice_is_refused_by_its_name_where_it_is_asked_for():
    table = "text,note,label,note\none,a,x,b\n"
    assert read(table) == {"text": ["one"], "label": ["x"]}
    assert "two columns named 'note'" in said(table, ("note",))
    assert "two columns named 'note'" in said(table, every=True)


def test_the_separator_is_the_given_one_or_the_plain_one_by_which_the_header_has_the_columns():
    assert read("text;label\none, two;x\n", separators=(";", ",")) == {"text": ["one, two"], "label": ["x"]}
    assert read("text,label\none; two,x\n", separators=(";", ",")) == {"text": ["one; two"], "label": ["x"]}
    assert read("sep=;\r\ntext;label\r\none, two;x\r\n") == {"text": ["one, two"], "label": ["x"]}


@pytest.mark.parametrize(("character", "name"), [(";", "semicolon"), ("\t", "tab"), ("|", "pipe")])
def test_another_separator_is_named_and_never_guessed(character, name):
    for wanted in (WANTED, ("text",), ("another",)):
        table = f"text{character}label\nsecret one, two{character}x\n"
        assert (
            f"1 column in its header as read now, and 2 columns if a {name} parts them; give separator={name}"
            in said(table, wanted)
        )


def test_a_separator_that_was_tried_is_not_named():
    assert read("text,label\none,x\n", ("another",), separators=("^", ",")) == {}


def test_one_column_is_enough_where_it_is_the_one_that_is_asked_for():
    assert read("text\none; two\n", ("text",)) == {"text": ["one; two"]}


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("text,label\nx,y\nsecret, and more,y\n", "3 cells in the row that ends at line 3, and 2 in its header"),
        ('text,label\nx,y\n\n"secret\n,y\nx,y\n', "quote in the row that begins at line 4 which is not closed"),
        ('text,label\n"secret" he said,y\n', "quote in the row that begins at line 2"),
        ('"text,label\nsecret,y\n', "quote in the row that begins at line 1"),
        ("text,label\n\n", "no rows"),
    ],
)
def test_what_is_no_csv_names_the_line_and_nothing_of_it(table, sentence):
    assert sentence in said(table)
    assert "secret" not in said(table)
