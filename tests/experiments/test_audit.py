"""The attack on the real program: an intact mechanism is never contradicted, a broken one always is.

Every break is planted in the project's own modules at a claimed epsilon of 1, and found by the one procedure that knows of
none. Seeds are fixed; a bound fails for at most one seed in a thousand, which is the false-alarm rate of each intact audit.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax.federation import round
from dplora_jax.privacy import clipping, noise, sampling, secrets
from experiments import audit

pytestmark = pytest.mark.usefixtures("quick_compile")
GAUSSIAN, KEYS, THRESHOLD = noise.gaussian, secrets.round_keys, sampling.threshold


def attack(subject, seed=0, planted=False, runs=1):
    """(claim, the larger bound, Bound); a planted break needs a program of its own."""
    program = round.make(subject.federation, subject.grid, transcript=True) if planted else None
    claim, bound = audit.audit(subject, runs, 1, np.random.default_rng(seed), program)
    return claim, max(bound.guesses, bound.curve), bound


@pytest.fixture(scope="module")
def subject():
    """A claim of epsilon 1: every record in every step."""
    return audit.small(1.0)


@pytest.mark.parametrize("seed", range(3))
def test_an_intact_mechanism_is_not_contradicted(subject, seed):
    claim, bound, _ = attack(subject, seed)
    assert bound <= claim <= 1


def no_noise(keys, tree, std, step):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def forgotten(index):
    """Noise on all matrices but one."""

    def gaussian(keys, tree, std, step):
        leaves, treedef = jax.tree.flatten(GAUSSIAN(keys, tree, std, step))
        leaves[index] = jnp.zeros_like(leaves[index])
        return treedef.unflatten(leaves)

    return gaussian


def clipped_after_the_sum(loss_fn, adapter, batch, clip_norm, weights=None, form="auto"):
    total = jax.grad(lambda a: (weights * loss_fn(a, batch)).sum())(adapter)
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(total)))
    return jax.tree.map(lambda g: g * clip_norm / jnp.maximum(norm, clip_norm), total), weights, weights


def unclipped_head(loss_fn, adapter, batch, clip_norm, weights=None, form="auto"):
    """The norm is of the layers' matrices alone."""

    def one(example):
        grad = jax.grad(lambda a: loss_fn(a, jax.tree.map(lambda x: x[None], example))[0])(adapter)
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grad["layers"])))
        return grad | {"layers": jax.tree.map(lambda g: g * clip_norm / jnp.maximum(norm, clip_norm), grad["layers"])}

    return jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), jax.vmap(one)(batch)), weights, weights


def same_noise_every_round(keys, rounds, attempt):
    return KEYS(keys, rounds, attempt) | {"noise": KEYS(keys, [1] * len(rounds), attempt)["noise"]}


def same_noise_everywhere(keys, rounds, attempt):
    return KEYS(keys, rounds, attempt) | {"noise": KEYS([keys[0]] * len(keys), rounds, attempt)["noise"]}


@pytest.mark.parametrize(
    ("module", "name", "broken"),
    [
        (noise, "gaussian", no_noise),
        (noise, "gaussian", forgotten(2)),
        (clipping, "clipped_grad_sum", unclipped_head),
    ],
    ids=["no noise", "noise forgotten on one matrix", "clip missing on the head"],
)
def test_a_broken_program_is_caught(subject, monkeypatch, module, name, broken):
    monkeypatch.setattr(module, name, broken)
    claim, bound, _ = attack(subject, planted=True)
    assert bound > claim
