"""What parsers say of a table that they fail on, by exception or log, is told to nobody."""

import csv
import json
import logging
import types

import datasets
import huggingface_hub
import pyarrow
import pytest

from dplora_jax.data import arrow_table, csv_table, hub, json_table, tables, tasks
from dplora_jax.errors import InputError

MARKER = "Mrs Marker's cyst"


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def rows(*_, **__):
    raise csv.Error(MARKER)
    yield


def said(read, capfd):
    with pytest.raises(InputError) as caught:
        read()
    assert MARKER not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert MARKER not in "".join(capfd.readouterr())
    return caught.value


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_what_a_parser_says_of_a_record_is_told_nobody(tmp_path, monkeypatch, suffix, capfd):
    monkeypatch.setattr(csv_table.csv, "reader", rows)
    decoder = types.SimpleNamespace(decode=failing(json.JSONDecodeError(MARKER, "", 0)))
    monkeypatch.setattr(json_table, "DECODER", decoder)
    monkeypatch.setattr(arrow_table, "read", failing(pyarrow.ArrowInvalid(MARKER)))
    monkeypatch.setattr(
        logging.root.manager, "disable", logging.CRITICAL
    )  # as in a run: of local tables nothing is logged
    path = tmp_path / f"train{suffix}"
    path.write_bytes(b"PAR1 and more")
    assert said(lambda: tables.read_file(path, ("words",)), capfd).__context__ is None


def test_what_the_hubs_library_logs_and_raises_of_a_row_is_told_nobody(monkeypatch, capfd):
    heard = []

    def fail(*_, **__):
        heard.append(datasets.logging.get_logger("datasets.builder").isEnabledFor(logging.ERROR))
        raise ValueError(MARKER)

    monkeypatch.setattr(logging.root.manager, "disable", 0)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    said(lambda: hub.read("piqa", tasks.TASKS["piqa"].hub, ("goal",)), capfd)
    assert heard == [False]
