"""Digests of what a run works with: another base model, records or program is another digest."""

import importlib.metadata
import types

import jax.numpy as jnp
import numpy as np
import pytest

import dplora_jax
from dplora_jax.federation import fingerprints

PARAMS = {"kernel": jnp.ones((2, 3))}
MODEL = types.SimpleNamespace(config="two layers")


@pytest.mark.parametrize(
    ("model", "params"),
    [
        (types.SimpleNamespace(config="three layers"), PARAMS),
        (MODEL, {"kernel": jnp.zeros((2, 3))}),
        (MODEL, {"kernel": jnp.ones((3, 2))}),
        (MODEL, {"bias": jnp.ones((2, 3))}),
        (MODEL, {"kernel": jnp.ones((2, 3), jnp.bfloat16)}),
    ],
)
def test_another_base_model_is_another_digest(model, params):
    assert fingerprints.digest_base(MODEL, PARAMS) == fingerprints.digest_base(
        MODEL, {"kernel": np.ones((2, 3), np.float32)}
    )
    assert fingerprints.digest_base(model, params) != fingerprints.digest_base(MODEL, PARAMS)


@pytest.mark.parametrize("name", fingerprints.LIBRARIES)
def test_another_version_of_a_library_is_another_program(monkeypatch, name):
    before, real = fingerprints.digest_installation(), importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "0.0.0" if n == name else real(n))
    assert fingerprints.digest_installation() != before


def test_a_changed_line_of_code_is_another_program(monkeypatch, tmp_path):
    monkeypatch.setattr(dplora_jax, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "privacy").mkdir()
    module = tmp_path / "privacy" / "noise.py"
    module.write_text("SCALE = 1\n")
    before = fingerprints.digest_installation()
    module.write_text("SCALE = 2\n")
    assert fingerprints.digest_installation() != before
