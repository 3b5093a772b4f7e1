"""A new aggregation and a new kind of noise are a file each, and a line in a registry: rounds, flags and a run know no more.

This file is theirs: votes in the place of means, and Laplace noise, for which no accountant here vouches."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax.errors import InputError
from dplora_jax.federation import methods
from dplora_jax.federation.methods.method import Method, Refusal
from dplora_jax.privacy import noises
from dplora_jax.privacy.noise import Noise
from experiments import cli, run
from tests.federation import small

pytestmark = pytest.mark.usefixtures("quick_compile")


def signs(client, start, done):
    """One vote a coordinate."""
    return jax.tree.map(jnp.sign, done.upload)


VOTES = Method(
    "votes",
    "the sign of each coordinate's weighted vote, a hundredth long",
    refuses=(Refusal("ema", 0.0, "votes do not average"),),
    terms=signs,
    settle=lambda mean, adapter, residual, number: (jax.tree.map(lambda x: jnp.sign(x) / 100, mean), residual),
)


class Laplace(Noise):
    """Laplace noise of the same standard deviation."""

    def add(self, sums, stds, keys, step, memory):
        key = jax.random.fold_in(jax.random.wrap_key_data(keys[0], impl="threefry2x32"), step)
        leaves, treedef = jax.tree.flatten(sums)
        drawn = [
            jax.random.laplace(k, x.shape) for k, x in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
        ]
        scale = stds / np.sqrt(2)
        return treedef.unflatten([x + scale * n for x, n in zip(leaves, drawn, strict=True)]), memory

    def words(self):
        return ["Laplace noise"]


class PlainNormal(Noise):
    """Gaussian noise by JAX's own generator."""

    def add(self, sums, stds, keys, step, memory):
        key = jax.random.fold_in(jax.random.wrap_key_data(keys[0], impl="threefry2x32"), step)
        leaves, treedef = jax.tree.flatten(sums)
        each = jax.random.split(key, len(leaves))
        noisy = [x + stds * jax.random.normal(k, x.shape) for k, x in zip(each, leaves, strict=True)]
        return treedef.unflatten(noisy), memory

    def words(self):
        return ["Gaussian noise, plainly"]


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(methods.BY_NAME, "votes", VOTES)
    monkeypatch.setitem(noises.KINDS, "laplace", noises.Kind(__name__, "Laplace", gaussian=False))
    monkeypatch.setitem(noises.KINDS, "plain", noises.Kind(__name__, "PlainNormal", gaussian=True))


def test_a_round_takes_an_aggregation_from_outside(registered):
    state, public, _ = small.run(small.Setup(method="votes", plain=True), rounds=[1])
    weights = np.array(small.SIZES) / sum(small.SIZES)
    for part in small.RATES:
        moved = jax.tree.map(np.subtract, state.adapter[part], small.adapter()[part])
        votes = jax.tree.map(lambda u: np.tensordot(weights, np.sign(u[0]), 1), public["uploads"][part])
        jax.tree.map(lambda m, v: np.testing.assert_allclose(m, np.sign(v) / 100, atol=1e-6), moved, votes)


def test_a_round_takes_a_noise_from_outside(registered):
    """Nobody joins, so that what is released is noise; a Laplace variable's fourth moment is 6, a normal's 3. False alarms: 1e-6
    (of some 8,000 draws, whose fourth powers deviate by 50)."""
    made = small.federation(small.Setup())
    made = dataclasses.replace(made, local=dataclasses.replace(made.local, noise=noises.kind("laplace")()))
    _, public = small.run_made(made, small.Setup(), [1], join_below=0)
    std = np.array(small.NOISES) * small.CLIP / small.DIVISORS
    scaled = [x / std.reshape(1, -1, *[1] * (x.ndim - 2)) for x in jax.tree.leaves(public["released"])]
    drawn = np.concatenate([x.reshape(-1) for x in scaled]).astype(float)
    assert (drawn**2).mean() == pytest.approx(1, abs=5 * np.sqrt(5 / drawn.size))
    assert (drawn**4).mean() > 4.5


@pytest.mark.slow
def test_a_run_takes_both_by_their_flags_and_tells_them(registered, tiny_bert, finance_table, tmp_path):
    command = [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=3", "--rounds=1", "--expected_batch_size=8", "--rank=2", "--epsilon=8", "--delta=1e-3",
        "--eval_every=0", "--seed=3", f"--workdir={tmp_path}", "--aggregation=votes", "--noise=plain",
    ]  # fmt: skip
    assert run.main(command) == 0
    method = json.loads((tmp_path / "config.json").read_text())["federation"]["method"]
    assert VOTES.words in method
    assert "Gaussian noise, plainly" in method
    with pytest.raises(ValueError, match="with --aggregation=votes: votes do not average"):
        cli.parse([*command, "--ema=0.5"])


def test_a_noise_that_the_accountant_does_not_know_has_no_epsilon(registered):
    command = ["--noise=laplace", "--delta=1e-3"]
    with pytest.raises(InputError, match="--noise=laplace is not the Gaussian noise that is accounted"):
        cli.parse([*command, "--epsilon=8"])
    assert cli.parse([*command, "--trust=none"]).privacy.noise == "laplace"
