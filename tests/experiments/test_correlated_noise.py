"""Noise correlated over rounds: the linear map is the server's own, and the matrices are what they are called."""

import jax
import numpy as np
import pytest

from dplora_jax.config import FederationConfig, replace
from dplora_jax.data import demos
from dplora_jax.federation import aggregation, program
from experiments import cli
from experiments.benchmark import correlated_noise

SHIPPED = correlated_noise.SETTINGS


@pytest.mark.parametrize("name", SHIPPED)
def test_the_settings_are_the_shipped_ones(name):
    config = cli.parse([f"--flagfile={name}.flags"])
    setting = SHIPPED[name]
    assert (config.schedule.rounds, config.schedule.local_steps) == (setting.rounds, 1)
    assert config.schedule.expected_batch_size == setting.batch
    if config.data.dataset in demos.DEMOS:
        assert len(demos.load(config.data.dataset, 0).train.texts) == config.schedule.clients * setting.records
    assert config.aggregation.server_momentum == setting.momentum
    assert (config.optimizer.lr_decay, config.aggregation.ema) == (setting.lr_decay, setting.ema)


@pytest.mark.parametrize("curvature", [0.0, 0.02])
@pytest.mark.parametrize("name", SHIPPED)
def test_the_last_average_is_the_map_of_the_rounds_noise(name, curvature):
    """The server's own optimizer and average, on one number whose uploads are noise and the pull of a quadratic loss."""
    setting = SHIPPED[name]
    fields = {"rounds": setting.rounds, "server_momentum": setting.momentum, "lr_decay": setting.lr_decay}
    server = program.optimizers(replace(FederationConfig(), **fields))[1]
    adapter = {"w": np.float32(0)}
    state, average = server.init(adapter), aggregation.average_init(adapter)
    noise = np.random.default_rng(0).standard_normal(setting.rounds)
    for drawn in noise:
        up = {"w": np.float32(curvature * adapter["w"] - drawn)}
        step, state = server.update(up, state, adapter)
        adapter = jax.tree.map(lambda x, s: x + s, adapter, step)
        average = aggregation.average_update(average, adapter, setting.ema)
    averages, adapters = correlated_noise.responses(setting, curvature)
    assert float(average.mean["w"]) == pytest.approx(averages[-1] @ noise, rel=1e-4, abs=1e-4)
    assert float(adapter["w"]) == pytest.approx(adapters[-1] @ noise, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("bands", [1, 2, 5, 8])
def test_a_factor_has_its_bands_and_columns_of_norm_1_and_is_no_better_than_the_least(bands):
    averages, _ = correlated_noise.responses(SHIPPED["medical"])
    c = correlated_noise.factor(averages, bands)
    assert np.array_equal(c, np.tril(c))
    assert not np.tril(c, -bands).any()
    assert np.linalg.norm(c, axis=0) == pytest.approx(1)
    last, least = np.linalg.norm(averages[-1] @ np.linalg.inv(c)), correlated_noise.least_last(averages[-1], bands)
    assert least <= last * (1 + 1e-9)
    assert last <= least * (1.1 if bands > 1 else 1 + 1e-6)


def test_the_least_noise_of_a_flat_sum_falls_with_the_root_of_the_bands():
    assert correlated_noise.least_last(np.ones(12), 1) == pytest.approx(12**0.5)
    assert correlated_noise.least_last(np.ones(12), 4) == pytest.approx(3**0.5)
    assert correlated_noise.least_last(np.ones(12), 12) == pytest.approx(1)


@pytest.mark.parametrize(("name", "bands"), [("finance", 5), ("phrasebank", 5), ("medical", 4)])
def test_the_matrix_that_is_built_leaves_no_more_in_the_last_average_than_the_optimised_one(name, bands):
    """Up to 2 in 100."""
    setting = SHIPPED[name]
    averages, _ = correlated_noise.responses(setting)
    c = correlated_noise.built(setting, bands)
    assert np.linalg.norm(c, axis=0).max() <= 1
    built, best = (
        np.linalg.norm(averages[-1] @ np.linalg.inv(m)) for m in (c, correlated_noise.factor(averages, bands))
    )
    assert built <= 1.02 * best
