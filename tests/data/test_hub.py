"""The cache of a call that reads the hub."""

import os
import pathlib
import subprocess
import tempfile

from dplora_jax.data import hub


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
