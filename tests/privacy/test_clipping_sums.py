"""How rows' sums are made: a choice for each matrix, sums for each owner, and norms that rounding cannot make too small."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import lora, losses
from dplora_jax.privacy import clipping
from dplora_jax.privacy.clipping import clipped_grad_sum
from tests.conftest import mostly_slow
from tests.privacy.test_clipping import HEAD, ONES, compiled, difference, loss_of, norm, setup, toy

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("case", mostly_slow(["classifier"], ["language model", "classifier"]))
def test_auto_chooses_for_each_matrix_and_every_choice_is_the_same_sum(case, monkeypatch):
    """Leaves in turn are kept and not: whichever way, sums and norms are those of a loop."""
    turn = iter(range(1000))
    monkeypatch.setattr(clipping.per_row, "keeps_less", lambda *_: next(turn) % 2 == 0)
    model, params, adapter, batch = setup(case)
    run = jax.jit(lambda adapter: clipped_grad_sum(loss_of(model, params), adapter, batch, 0.5, ONES, "auto"))
    mine, expected = run(adapter), compiled(case, "vmap")(params, adapter, batch, 0.5, ONES)
    assert next(turn) >= 4
    assert norm(difference(mine[0], expected[0])) < 1e-5 * norm(expected[0])
    np.testing.assert_allclose(mine[1], expected[1], rtol=1e-5)


@pytest.mark.parametrize("form", mostly_slow(["vmap", "auto"], ["vmap", "broadcast", "auto"]))
def test_sums_by_owner_are_those_of_each_owners_rows_alone(form):
    """The second owner has no row, and the last one's is not finite."""
    model, params, adapter, batch = setup("classifier")
    batch = batch | {"input_ids": batch["input_ids"].copy()}
    batch["input_ids"][1, 1:3] = 10**6  # beyond the vocabulary: nan
    owner, weights = np.array([0, 2, 0], np.int32), np.array([1, 1, 0.5], np.float32)
    loss = loss_of(model, params)
    run = jax.jit(lambda *a: clipped_grad_sum(loss, adapter, batch, 0.05, *a, form, owners=(owner, 3))[0])
    found = run(weights)
    for k in range(3):
        expected = compiled("classifier", form if form != "auto" else "vmap")(
            params, adapter, batch, 0.05, weights * (owner == k)
        )[0]
        jax.tree.map(lambda a, b, k=k: np.testing.assert_allclose(a[k], b, atol=1e-6), found, expected)
    assert norm(jax.tree.map(lambda x: x[0], found)) > 0.04
    assert norm(jax.tree.map(lambda x: x[2], found)) == 0


class Wide:
    """One adapted matrix, as wide as GPT-2's: its output, weighted by each token's own row of `g`, is the loss."""

    dtype = jnp.float32

    def apply(self, params, batch, adapter):
        def layer(x, pair):
            return x, lora.product(batch["x"], pair)

        return jax.lax.scan(layer, 0.0, adapter["layers"]["q"])[1][0]


@functools.cache
def wide_sum(form):
    loss = losses.ModelLoss(Wide(), None, lambda y, batch: (y * batch["g"]).sum((1, 2)))
    return jax.jit(lambda adapter, batch: clipped_grad_sum(loss, adapter, batch, 1.0, form=form)[0])


@pytest.mark.parametrize("form", ["broadcast", "ghost", "auto"])
@pytest.mark.parametrize("off", [1e-3, 1e-5, 0.0])
def test_a_record_of_tokens_that_cancel_is_cut_all_the_same(form, off):
    """Two tokens alike but for their sign, and each number the same: float32 sums of 2304 such numbers err in one direction."""
    adapter = {"layers": {"q": lora.Pair(jnp.eye(512)[None], jnp.ones((1, 2304, 512)), 1.0)}}
    g = jnp.stack([jnp.full(2304, 8.73), jnp.full(2304, -8.73 * (1 - off))])[None]
    batch = {"x": jnp.full((1, 2, 512), 7.31), "g": g, "input_ids": jnp.zeros((1, 2), jnp.int32)}
    assert norm(wide_sum(form)(adapter, batch)) <= 1 + 1e-3


@pytest.mark.parametrize("form", ["ghost"])
def test_sums_by_owner_need_rows_of_their_own(form):
    with pytest.raises(ValueError, match="by owner"):
        clipped_grad_sum(toy(None), HEAD, {"x": jnp.ones((2, 3))}, 1.0, form=form, owners=(np.zeros(2), 1))
