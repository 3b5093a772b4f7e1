"""What parsers say of a table that they fail on, by exception or log, is told to nobody."""

import json
import logging

import datasets
import pandas
import pyarrow
import pytest

from dplora_jax.data import tables
from dplora_jax.errors import InputError

MARKER = "Mrs Marker's cyst"


@pytest.mark.parametrize(
    "error", [ValueError, KeyError, pandas.errors.ParserError, pyarrow.ArrowInvalid, json.JSONDecodeError]
)
@pytest.mark.parametrize("place", ["load_dataset", "to_dict"])
def test_what_a_parser_says_of_a_record_is_told_nobody(tmp_path, monkeypatch, place, error, capfd):
    def fail(*_, **__):
        datasets.logging.get_logger("datasets.builder").error(MARKER)
        raise error(MARKER, "", 0) if error is json.JSONDecodeError else error(MARKER)

    (tmp_path / "train.csv").write_text(f"words,mood\n{MARKER},a\n")
    monkeypatch.setattr(logging.root.manager, "disable", 0)
    monkeypatch.setattr(*((datasets, place) if place == "load_dataset" else (datasets.Dataset, place)), fail)
    with pytest.raises(InputError, match="cannot be read") as caught:
        tables.read_file(tmp_path / "train.csv")
    assert MARKER not in str(caught.value)
    assert caught.value.__context__ is None
    assert MARKER not in "".join(capfd.readouterr())
