"""Every example in a docstring gives what it says."""

import doctest
import importlib
import pathlib

import pytest

import dplora_jax
import experiments

MODULES = sorted(
    ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
    for root in (pathlib.Path(package.__file__).parent for package in (dplora_jax, experiments))
    for path in root.rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_its_examples_hold(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0
