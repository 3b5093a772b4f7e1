"""What decides between a replay under the same keys and a new, paid attempt."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import dplora_jax
from experiments import flags, setup

CONFIG = flags.RunConfig()
PARAMS = {"kernel": jnp.ones((2, 3))}


def fingerprint(config=CONFIG, records=b"records", params=PARAMS, mechanisms=()):
    grid = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("clients", "model"))
    return setup._fingerprint(config, records, params, mechanisms, grid)


def test_the_same_inputs_have_the_same_fingerprint():
    assert fingerprint() == fingerprint()


@pytest.mark.parametrize("name", ["jax", "jaxlib", "flax", "optax", "numpy", "jax_privacy"])
def test_another_version_of_a_library_changes_the_fingerprint(monkeypatch, name):
    before, real = fingerprint(), importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "0.0.0" if n == name else real(n))
    assert fingerprint() != before


def test_a_changed_line_of_code_changes_the_fingerprint(monkeypatch, tmp_path):
    monkeypatch.setattr(dplora_jax, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "privacy").mkdir()
    module = tmp_path / "privacy" / "noise.py"
    module.write_text("SCALE = 1\n")
    before = fingerprint()
    module.write_text("SCALE = 2\n")
    assert fingerprint() != before


@pytest.mark.parametrize(
    "changed",
    [
        {"records": b"others"},
        {"params": {"kernel": jnp.zeros((2, 3))}},
        {"mechanisms": (1,)},
        {"config": flags.RunConfig(clip_norm=2.0)},
        {"config": flags.RunConfig(mesh="8x1")},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_whatever_feeds_the_mechanism_changes_the_fingerprint(changed):
    assert fingerprint(**changed) != fingerprint()


def test_xla_flags_change_the_fingerprint(monkeypatch):
    before = fingerprint()
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert fingerprint() != before
