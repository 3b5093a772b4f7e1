"""Checkpoints as a killed program leaves them."""

import logging
import resource
import shutil

import jax.numpy as jnp
import pytest

from dplora_jax.checkpoint import Checkpoints, anchors
from dplora_jax.errors import InputError

ANCHOR = {"entries": 0, "head": "0"}


@pytest.fixture
def saved(tmp_path):
    """A directory with checkpoints 1 and 2 of a state that is its number."""
    manager = Checkpoints(tmp_path)
    for number in (1, 2):
        manager.save(number, {"state": jnp.full(3, float(number))}, {"ledger": ANCHOR})
        manager.wait()
    manager.close()
    return tmp_path


def test_one_that_was_being_removed_does_not_stand_in_the_way(saved):
    shutil.rmtree(saved / "1" / "notes")
    assert anchors(saved) == [("checkpoint 2", ANCHOR)]
    manager = Checkpoints(saved)
    number, state, _ = manager.restore({"state": jnp.zeros(3)})
    assert (number, state["state"].tolist()) == (2, [2.0, 2.0, 2.0])
    for number in (3, 4):
        manager.save(number, state, {"ledger": ANCHOR})
        manager.wait()
    manager.close()
    assert [name for name, _ in anchors(saved)] == ["checkpoint 3", "checkpoint 4"]


def test_nothing_is_saved_in_the_background(tmp_path):
    """Of several processes, the others would wait for one whose save fails there, and say nothing of why."""
    manager = Checkpoints(tmp_path)
    manager.save(1, {"state": jnp.zeros(3)}, {"ledger": ANCHOR})
    assert anchors(tmp_path) == [("checkpoint 1", ANCHOR)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(Exception, match="File too large"):
            manager.save(2, {"state": jnp.zeros(1000)}, {"ledger": ANCHOR})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    manager.close()


def test_orbaxs_tracebacks_do_not_stand_before_the_sentence(saved):
    Checkpoints(saved).close()
    log = logging.getLogger("absl")
    own, another = (
        log.makeRecord("absl", logging.ERROR, path, 1, "failed", (), None)
        for path in ("/site-packages/orbax/checkpoint/future.py", "/elsewhere.py")
    )
    assert not log.filter(own)
    assert log.filter(another)


def test_a_newest_one_that_cannot_be_read_is_named(saved):
    shutil.rmtree(saved / "2" / "state")
    manager = Checkpoints(saved)
    with pytest.raises(InputError, match=r"checkpoint .*2 cannot be read .* remove it"):
        manager.restore({"state": jnp.zeros(3)})
    manager.close()
    shutil.rmtree(saved / "2" / "notes")
    with pytest.raises(InputError, match="2 is damaged"):
        anchors(saved)
