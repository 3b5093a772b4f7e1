"""Metrics say so where the model's numbers are none."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import evaluation
from dplora_jax.data import tasks
from dplora_jax.models import gpt2

pytestmark = pytest.mark.usefixtures("quick_compile")
GRID = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("clients", "model"))
ROWS = {"input_ids": np.array([[0, 1], [1, 2], [2, 0]], np.int32), "attention_mask": np.ones((3, 2), np.int32)}
CONFIG = {"vocab_size": 3, "n_embd": 4, "n_layer": 1, "n_head": 1, "n_positions": 4, "model_type": "gpt2"}


def classifier(bad):
    """Logits [B, 2] that are `bad` where the first id is 1."""

    def apply(params, batch, adapter):
        return jnp.where(batch["input_ids"][:, :1] == 1, bad, jnp.array([[0.0, 1.0]]))

    return types.SimpleNamespace(apply=apply, config=types.SimpleNamespace(num_labels=2))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_classifiers_metrics_are_nan_where_a_logit_is_not_finite(bad):
    table = ROWS | {"labels": np.array([1, 0, 1], np.int32)}
    found = evaluation.classifier(classifier(bad), GRID, {}, table)({})
    assert all(math.isnan(value) for value in found.values())
    assert evaluation.classifier(classifier(2.0), GRID, {}, table)({})["accuracy"] == 1


@pytest.fixture
def language_model():
    """(model, its parameters, the same with a NaN in the last id's embedding)."""
    made = gpt2.Gpt2(gpt2.from_config(CONFIG, None))
    params = jax.jit(made.init)(jax.random.key(0))
    bad = jax.tree.map(jnp.array, params)
    bad["embed"]["word"] = bad["embed"]["word"].at[2].set(jnp.nan)
    return made, params, bad


def test_a_language_models_metrics_are_nan_where_a_likelihood_is_not_finite(language_model):
    model, good, bad = language_model
    table = ROWS | {"loss_mask": np.ones((3, 2), np.int32)}
    table = {name: np.concatenate([value, value[:1]]) for name, value in table.items()}
    asked = [tasks.Asked(("a", "a"), (" b", " c"), 0)] * 2
    for params, is_bad in ((good, False), (bad, True)):
        found = evaluation.perplexity(model, GRID, params, table)({})
        found |= evaluation.choices(model, GRID, params, table, asked)({})
        assert {math.isnan(value) for value in found.values()} == {is_bad}
        assert set(found) == {"perplexity", "accuracy", "accuracy_norm"}


def test_a_perplexity_too_large_for_a_float_is_infinite(language_model, monkeypatch):
    model, params, _ = language_model
    monkeypatch.setattr(evaluation, "likelihoods", lambda *_: lambda *_: np.array([-1e4]))
    table = {name: value[:1] for name, value in ROWS.items()} | {"loss_mask": np.ones((1, 2), np.int32)}
    assert evaluation.perplexity(model, GRID, params, table)({}) == {"perplexity": math.inf}
