"""What anyone may have written is read within bounds, and of its type or not at all."""

import json
import math

import pytest

from dplora_jax import json_files
from dplora_jax.json_files import (
    Unfit,
    anything,
    list_of,
    mapping_of,
    one_of,
    optional,
    parse,
    real,
    record,
    text,
    whole,
)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (whole(1, 9), [1, 9], [0, 10, 1.0, True, "1", None, math.nan]),
        (real(0, 1, above=True), [1, 0.5], [0, 0.0, 1.1, False, "inf", math.nan, [1]]),
        (real(0), [0, 1e308, 10**300], [-1, 10**400, math.nan, "-inf"]),
        (json_files.flag, [True, False], [0, 1, "true", None]),
        (text(3), ["", "abc"], ["abcd", 1, None, ["a"]]),
        (one_of("a", "b"), ["a"], ["c", ["a"], {}, None]),
        (json_files.hexadecimal(4), ["", "00ff"], ["0g", "00FF", "00fff", 0, "0\n"]),
        (optional(whole(1, 2)), [None, 1], [3, "x"]),
        (list_of(whole(1, 2), 2, 1), [[1], [1, 2]], [[], [1, 1, 1], [3], {}, "12"]),
        (mapping_of(text(1), 1), [{}, {"a": "b"}], [{"a": 1}, {"[x]": "b"}, {"a": "b", "c": "d"}, []]),
        (
            record({"a": whole(1, 2)}),
            [{"a": 1}, {"a": 1, "later": "x"}],
            [{}, {"a": 3}, {"a": 1, "later": []}, [], "a"],
        ),
    ],
)
def test_a_check_passes_what_it_is_for_and_nothing_else(check, good, bad):
    assert [check(value) for value in good] == good
    for value in bad:
        with pytest.raises(Unfit):
            check(value)


def test_inf_is_infinity():
    assert real(0)("inf") == math.inf


def test_a_text_of_too_many_parts_or_bytes_is_not_parsed(monkeypatch):
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(Unfit, match="too large"):
        parse(b" " * 11, anything, 10)
    with pytest.raises(Unfit, match="more than"):
        parse(b"[" + b"[]," * json_files.MOST_PARTS + b"[]]", anything, 1 << 30)
    with pytest.raises(Unfit, match="commas"):  # of one list only: 256 MiB of it took minutes and gigabytes
        parse(b"[" + b"1," * (json_files.MOST_ITEMS + 1) + b"1]", anything, 1 << 30)


def test_no_more_than_the_bound_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MOST_BYTES", 10)
    (tmp_path / "file").write_bytes(b"1" * 10)
    assert json_files.load(tmp_path / "file", whole(0, 10**10))
    (tmp_path / "file").write_bytes(b"1" * 11)
    with pytest.raises(Unfit, match="more than"):
        json_files.read(tmp_path / "file")
    with pytest.raises(Unfit, match="it "):
        json_files.read(tmp_path)
