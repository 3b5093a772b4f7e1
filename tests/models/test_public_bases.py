"""Bases from public text see what tells texts apart, and not what they share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import lora
from dplora_jax.models import public_bases

pytestmark = pytest.mark.usefixtures("quick_compile")
INPUTS, OUTPUTS, APART = 8, 6, 3


@dataclasses.dataclass(frozen=True)
class Linear:
    """A matrix of one layer, as an adapter's target."""

    @property
    def targets(self):
        return {
            "w": dataclasses.make_dataclass("Target", ["shape", "layered", "aliases"])((INPUTS, OUTPUTS), True, ("w",))
        }

    @property
    def config(self):
        return dataclasses.make_dataclass("Config", ["num_layers"])(1)


def vectors(rows, size, seed):
    """[N, 1, size] that share a long vector and differ along three directions of unlike spread, and by a little noise in all."""
    rng = np.random.default_rng(seed)
    shared, *apart = rng.standard_normal((1 + APART, size))
    spread = np.array([3.0, 1.0, 0.3])
    differ = (rng.standard_normal((rows, APART)) * spread) @ np.array(apart)
    return (20 * shared + differ + 0.02 * rng.standard_normal((rows, size)))[:, None]


def texts(rows):
    """Inputs of the matrix, and what its outputs are multiplied by."""
    return {"x": vectors(rows, INPUTS, 0), "delta": vectors(rows, OUTPUTS, 1)}


def outputs(params, pairs, batch):
    """One number: the sum of a row's outputs, weighed by its own delta."""
    pair = jax.tree.map(lambda x: x[0], pairs["w"])
    return (lora.product(batch["x"].astype(jnp.float32), pair)[:, 0] * batch["delta"][:, 0]).sum(-1, keepdims=True)


def found(rows, rank=APART):
    made = public_bases.bases(outputs, Linear(), {}, lora.LoraConfig(rank, 1.0 * rank, ("w",)), rows)["w"]
    return made["a"][0], made["b"][0]


def test_what_all_texts_share_is_not_seen():
    rows = texts(60)
    a, b = found(rows)
    x, delta = rows["x"][:, 0].mean(0), rows["delta"][:, 0].mean(0)
    assert np.abs(a @ x).max() < 0.02 * np.linalg.norm(a, 2) * np.linalg.norm(x)
    assert np.abs(delta @ b).max() < 0.02 * np.linalg.norm(b, 2) * np.linalg.norm(delta)


def test_each_direction_of_the_inputs_counts_alike():
    rows = texts(400)
    seen = rows["x"][:, 0] @ found(rows)[0].T
    assert seen.std(0).max() < 2 * seen.std(0).min()
    assert rows["x"][:, 0].std(0).max() > 3 * rows["x"][:, 0].std(0).min()


def test_a_records_gradient_by_the_core_has_mean_square_one():
    rows = texts(100)
    a, b = found(rows)
    cores = np.einsum("nd,dr,si,ni->nrs", rows["delta"][:, 0], b, a, rows["x"][:, 0])
    assert np.square(cores).sum((1, 2)).mean() == pytest.approx(1, rel=1e-3)


def test_other_public_texts_of_the_kind_give_much_the_same_space():
    rows = texts(400)
    halves = [{name: x[part] for name, x in rows.items()} for part in (slice(200), slice(200, None))]
    one, other = (np.linalg.qr(found(half)[0].T)[0] for half in halves)
    assert np.linalg.svd(one.T @ other, compute_uv=False).min() > 0.9


@pytest.mark.parametrize(
    ("rows", "rank", "sentence"),
    [
        (texts(1), 5, "do not tell 5 directions"),
        ({name: np.ones_like(x) for name, x in texts(9).items()}, 2, "all alike"),
    ],
)
def test_rows_that_tell_nothing_are_refused(rows, rank, sentence):
    with pytest.raises(ValueError, match=sentence):
        found(rows, rank)
