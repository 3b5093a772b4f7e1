"""Fixtures of the tests on runs."""

import functools

import pytest

from dplora_jax.finetuning import setup


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    """Runs of a module that are of one program share it: `setup.prepare` is given one dict."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "prepare", functools.partial(setup.prepare, programs={}))
        yield
