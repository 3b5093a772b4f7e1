"""What decides between a replay under the same keys and a new, paid attempt, told apart by its cause."""

import importlib.metadata
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import dplora_jax
from experiments import causes, flags

CONFIG = flags.RunConfig()
PARAMS = {"kernel": jnp.ones((2, 3))}
RECORDS = {"input_ids": np.arange(6).reshape(2, 3)}
MODEL = types.SimpleNamespace(config="two layers")


def digests(config=CONFIG, records=RECORDS, model=MODEL, params=PARAMS, mechanisms=(), devices=1):
    grid = Mesh(np.array(jax.devices()[:devices]).reshape(devices, 1), ("clients", "model"))
    return causes.digests(config, records, model, params, mechanisms, grid)


@pytest.fixture(scope="module")
def before():
    return digests()


def changed(before, after):
    return {name for name in before if before[name] != after[name]}


def test_the_same_inputs_have_the_same_digests(before):
    assert digests() == before
    assert len(set(before.values())) == len(before)
    assert digests(config=flags.RunConfig(workdir="elsewhere", dispatch_rounds=1, eval_every=1)) == before


@pytest.mark.parametrize("name", ["jax", "jaxlib", "flax", "optax", "numpy"])
def test_another_version_of_a_library_is_a_cause(before, monkeypatch, name):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "0.0.0" if n == name else real(n))
    assert changed(before, digests()) == {"versions"}


def test_a_changed_line_of_code_is_a_cause(monkeypatch, tmp_path):
    monkeypatch.setattr(dplora_jax, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "privacy").mkdir()
    module = tmp_path / "privacy" / "noise.py"
    module.write_text("SCALE = 1\n")
    first = digests()
    module.write_text("SCALE = 2\n")
    assert changed(first, digests()) == {"code"}


@pytest.mark.parametrize(
    ("inputs", "cause"),
    [
        ({"records": {"input_ids": np.arange(6).reshape(3, 2)}}, {"data"}),
        ({"records": {"input_ids": np.arange(1, 7).reshape(2, 3)}}, {"data"}),
        ({"params": {"kernel": jnp.zeros((2, 3))}}, {"base"}),
        ({"params": {"kernel": jnp.ones((3, 2))}}, {"base"}),
        ({"model": types.SimpleNamespace(config="three layers")}, {"base"}),
        ({"mechanisms": (1,)}, {"config"}),
        ({"config": flags.RunConfig(clip_norm=2.0)}, {"config"}),
        ({"config": flags.RunConfig(wave=2)}, {"config"}),
        ({"devices": 2}, {"mesh"}),
    ],
)
def test_whatever_decides_the_bits_is_a_cause(before, inputs, cause):
    assert changed(before, digests(**inputs)) == cause


@pytest.mark.parametrize("name", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
def test_the_compilers_flags_are_a_cause(before, monkeypatch, name):
    monkeypatch.setenv(name, "--xla_cpu_enable_fast_math=true")
    assert changed(before, digests()) == {"xla"}


def test_another_processor_is_a_cause(before, monkeypatch):
    monkeypatch.setattr(causes, "_processor", lambda: "another")
    assert changed(before, digests()) == {"devices"}


def test_which_process_has_which_processor_is_a_cause():
    """Two unlike hosts in another order put a client on another processor, whose sums may round otherwise; alike ones do not, and
    how many they are is the mesh's cause."""
    a, b = {"devices": "aa"}, {"devices": "bb"}
    assert causes.together([a, b]) != causes.together([b, a])
    assert causes.together([a, a, b]) != causes.together([a, b, b])
    assert causes.together([a, a]) == causes.together([a]) == {"devices": bytes.fromhex("aa")}
