"""LoRA's A from public text sees what tells texts apart, and not what they share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import lora
from dplora_jax.models import public_directions

pytestmark = pytest.mark.usefixtures("quick_compile")
INPUTS, APART = 8, 3


@dataclasses.dataclass(frozen=True)
class Linear:
    """A matrix of one layer, as an adapter's target."""

    @property
    def targets(self):
        return {"w": dataclasses.make_dataclass("Target", ["shape", "layered", "aliases"])((INPUTS, 5), True, ("w",))}

    @property
    def config(self):
        return dataclasses.make_dataclass("Config", ["num_layers"])(1)


def texts(rows, seed=0):
    """Inputs [N, 1, I] that share a long vector and differ along three directions of unlike spread ->
    (inputs, the shared vector)."""
    rng = np.random.default_rng(seed)
    shared, *apart = rng.standard_normal((1 + APART, INPUTS))
    spread = np.array([3.0, 1.0, 0.3])
    return (20 * shared + (rng.standard_normal((rows, APART)) * spread) @ np.array(apart))[:, None], shared


def outputs(params, pairs, batch):
    pair = jax.tree.map(lambda x: x[0], pairs["w"])
    return lora.product(batch["x"].astype(jnp.float32), pair)[:, 0] @ params["out"]


def found(rows, rank=APART, **options):
    params = {"out": jnp.asarray(np.random.default_rng(5).standard_normal((5, 2)), jnp.float32)}
    config = lora.LoraConfig(rank, 2.0, ("w",))
    return public_directions.directions(outputs, Linear(), params, config, {"x": rows}, **options)["w"][0]


def test_what_all_texts_share_is_not_seen():
    rows, _ = texts(60)
    a, mean = found(rows), rows[:, 0].mean(0)
    assert np.abs(a @ mean).max() < 1e-4 * np.linalg.norm(a) * np.linalg.norm(mean)


def test_each_direction_counts_alike():
    rows, _ = texts(400)
    seen = rows[:, 0] @ found(rows).T
    np.testing.assert_allclose(np.corrcoef(seen.T), np.eye(APART), atol=0.02)
    np.testing.assert_allclose(seen.std(0) / seen.std(0).mean(), 1, atol=0.02)


def test_other_public_texts_of_the_kind_give_much_the_same_space():
    one, other = (np.linalg.qr(found(texts(400)[0][part]).T)[0] for part in (slice(200), slice(200, None)))
    assert np.linalg.svd(one.T @ other, compute_uv=False).min() > 0.9


def test_rows_are_as_long_as_a_fresh_ones():
    a = found(texts(60)[0])
    assert np.square(a).sum(1).mean() == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("rows", "rank", "sentence"),
    [(texts(1)[0], 5, "do not tell 5 directions"), (np.ones((9, 1, INPUTS)), 2, "all alike")],
)
def test_rows_that_tell_nothing_are_refused(rows, rank, sentence):
    with pytest.raises(ValueError, match=sentence):
        found(rows, rank)
