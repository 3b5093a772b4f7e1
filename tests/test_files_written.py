"""JSON that other programs read holds no NaN and no Infinity."""

import errno
import json
import math
import os
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

import dplora_jax
from dplora_jax import files
from dplora_jax.checkpoint import Checkpoints
from dplora_jax.privacy import secrets
from dplora_jax.privacy.ledger import Ledger

ROOT = pathlib.Path(dplora_jax.__file__).parent.parent
# Not strict: bytes that are hashed, which must stay the same in every version, and what a measurement's own child prints.
OWN = {"dplora_jax/files.py", "dplora_jax/privacy/secrets.py", "experiments/sweep/cells.py"}
OWN |= {"experiments/benchmark/memory.py", "experiments/benchmark/scale.py"}


def test_what_json_has_no_number_for_is_a_word_that_float_reads():
    value = {
        "a": [math.inf, -math.inf, (np.float64("nan"), 0.5)],
        "b": {"c": math.nan},
        "d": True,
        "e": None,
        "f": "nan",
    }
    text = files.to_json(value)
    assert text == '{"a": ["inf", "-inf", ["nan", 0.5]], "b": {"c": "nan"}, "d": true, "e": null, "f": "nan"}'
    assert [files.number(v) for v in json.loads(text)["a"][:2]] == [math.inf, -math.inf]
    assert math.isnan(files.number("nan"))
    assert [files.number(v) for v in (1, 0.5, True, None, "0.5", [1.0])] == [1, 0.5, None, None, None, None]


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EACCES, errno.EIO])
def test_a_file_that_is_out_of_reach_is_not_taken_for_none(tmp_path, monkeypatch, code):
    """A ledger or secrets that were begun anew there would spend the budget a second time."""
    monkeypatch.setattr("pathlib.Path.exists", lambda *_, **__: False)  # as Python 3.14 has it of such a file

    def lost(*_):
        raise OSError(code, os.strerror(code), "/there/file")

    monkeypatch.setattr("os.open", lost)
    for read in (lambda: Ledger(tmp_path / "privacy_ledger.jsonl"), lambda: secrets.load(tmp_path)):
        with pytest.raises(OSError, match=re.escape(os.strerror(code))):
            read()


def test_every_json_is_written_by_the_strict_writer():
    for path in (*ROOT.glob("dplora_jax/**/*.py"), *ROOT.glob("experiments/**/*.py")):
        name = path.relative_to(ROOT).as_posix()
        assert name in OWN or not re.search(r"json\.dumps?\(", path.read_text(encoding="utf-8")), name


def test_a_checkpoints_notes_are_strict(tmp_path):
    manager = Checkpoints(tmp_path)
    notes = {"ledger": {"entries": 0, "head": "0"}, "lines": [{"accuracy": math.nan, "epsilon": [math.inf]}]}
    manager.save(1, {"state": jnp.zeros(3)}, notes)
    manager.wait()
    assert manager.restore({"state": jnp.zeros(3)})[2]["lines"] == [{"accuracy": "nan", "epsilon": ["inf"]}]
    manager.close()

    def refuse(word):
        raise AssertionError(word)

    json.loads((tmp_path / "1" / "notes" / "metadata").read_text(), parse_constant=refuse)


@pytest.mark.parametrize("value", [1.5, math.nan, -math.inf])
def test_a_number_is_read_back_as_it_was(value):
    read = files.number(json.loads(files.to_json([value]))[0])
    assert read == value or (math.isnan(read) and math.isnan(value))
