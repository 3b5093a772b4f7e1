"""The cache of a call that reads the hub."""

import os
import pathlib
import subprocess
import tempfile

import datasets
import pytest

from dplora_jax.data import hub
from dplora_jax.errors import InputError


def test_the_cache_is_of_mode_0700_and_deleted_and_so_is_what_a_killed_process_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, living = tmp_path / f"dplora-{ended.pid}-x", tmp_path / f"dplora-{os.getppid()}-x"
    for folder in (left, living):
        folder.mkdir()
        (folder / "table").write_text("a row")
    with hub._datasets() as (_, cache):
        assert os.stat(cache).st_mode & 0o777 == 0o700
        assert pathlib.Path(cache).parent == tmp_path
        assert not left.exists()
    assert list(tmp_path.iterdir()) == [living]


def test_the_hubs_labels_are_their_names_and_its_texts_strings():
    features = datasets.Features({"label": datasets.ClassLabel(names=["up", "down"]), "text": datasets.Value("string")})
    of = datasets.Dataset.from_dict({"label": [1, 0, -1], "text": ["007", "4.0", None]}, features=features).data.table
    found = hub._table("here", of, (), every=True)
    assert found.columns == {"label": ["down", "up", None], "text": ["007", "4.0", None]}
    assert found.names == ["label", "text"]
    with pytest.raises(InputError, match="here has two columns named 'text'"):
        hub._table("here", of.append_column("text", of["text"]), ("text",), every=False)
