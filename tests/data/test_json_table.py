"""JSON: strings as they are, numbers as they are written."""

import io
import json

import pytest

from dplora_jax.data import json_table
from dplora_jax.data.cells import UnreadableError

STRINGS = [
    "2023-01-05",
    "2023-01-05T10:00:00Z",
    "007",
    "1e5",
    "4.0",
    "NA",
    "null",
    "True",
    "9" * 6000,
    " spaced ",
    "a\u2028b",
    "",
]


def read(text, wanted=("text",), every=False):
    return json_table.read(io.StringIO(text, newline="\n"), wanted, every)[1]


@pytest.mark.parametrize("cell", STRINGS)
def test_a_string_stays_as_it_is_when_all_look_alike(cell):
    rows = [{"text": cell}] * 3
    assert read("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)) == {"text": [cell] * 3}
    assert read(json.dumps(rows, indent=2)) == {"text": [cell] * 3}


def test_numbers_are_as_they_are_written_and_null_and_nan_are_missing():
    written = ["4.0", "1e5", "-0", "2.00", "9" * 6000, "true", "false"]
    assert read("".join(f'{{"text": {number}}}\n' for number in written)) == {"text": written}
    assert read('{"text": null}\n{"text": NaN}\n\n{}\n{"text": "x"}\n') == {"text": [None, None, None, "x"]}


def test_every_column_is_as_long_as_the_table_and_what_nobody_asked_for_is_left():
    rows = '{"text": "a"}\n{"text": "b", "more": [1, {"x": 2}]}\n{"text": "c"}\n'
    assert read(rows, every=True) == {"text": ["a", "b", "c"], "more": [None, ["1", {"x": "2"}], None]}
    assert read(rows, ("text", "absent")) == {"text": ["a", "b", "c"]}
    assert read('["a", "b"]') == {"text": ["a", "b"]}


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ('{"text": "a"}\n{"text": "secret"\n', "not JSON at line 2"),
        ('{\n  "text": "secret"\n}\n', "not JSON at line 1; give one whole object a line"),
        ('{"text": "secret"}\n"secret"\n', "no object at line 2"),
        ('[{"text": "a"}, null]', "no object at row 2"),
        ('{"text": "secret", "text": "b"}\n', "names a key of an object twice at line 1"),
        ("[" * 100_000, "not JSON"),
        ("[]", "no rows"),
    ],
)
def test_what_is_no_table_names_the_line_and_nothing_of_it(table, sentence):
    with pytest.raises(UnreadableError, match=sentence) as caught:
        read(table)
    assert "secret" not in str(caught.value)
