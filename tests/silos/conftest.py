"""Fixtures of the tests on silos: federations without a seed, as they are where it counts."""

import pytest

from dplora_jax.silos import coordinator as coordinators
from tests.silos import plan_house, small_silos


@pytest.fixture(params=["local", "masked"])
def made(request, tmp_path):
    return small_silos.Federation(tmp_path, **({} if request.param == "local" else small_silos.MASKED) | {"seed": None})


@pytest.fixture
def local(tmp_path):
    return small_silos.Federation(tmp_path, seed=None)


@pytest.fixture
def masked(tmp_path):
    return small_silos.Federation(tmp_path, seed=None, **small_silos.MASKED)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Who is gone at the end is not waited for long."""
    monkeypatch.setattr(coordinators, "END_SECONDS", 3.0)


@pytest.fixture(scope="module")
def house(tiny_bert, finance_table, tmp_path_factory):
    """A folder as `plan_house.make` fills it."""
    folder = tmp_path_factory.mktemp("house")
    plan_house.make(folder, tiny_bert, finance_table)
    return folder
