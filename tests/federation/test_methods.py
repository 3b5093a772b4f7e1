"""Each way to put uploads together does what its paper's equation says, to the very uploads of the compiled round."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import lora
from dplora_jax.federation import exact
from tests.conftest import mostly_slow
from tests.federation import small

pytestmark = pytest.mark.usefixtures("quick_compile")
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
WEIGHTS = np.array(small.SIZES) / sum(small.SIZES)


@functools.cache
def shown(method, **options):
    """Two rounds, one dispatch each: [(state before, state after, uploads of the round without its axis)]."""
    setup = small.Setup(method=method, plain=True, **options)
    federation = small.federation(setup)
    before, rounds = jax.tree.map(np.array, federation.init(jax.tree.map(jnp.array, start(method)), 5)), []
    for number in (1, 2):
        after, public, _ = small.run(setup, rounds=[number], state=jax.tree.map(jnp.array, before))
        rounds.append((before, after, jax.tree.map(lambda x: x[0], public)))
        before = after
    return rounds


def start(method):
    """The adapter of `small`; FLoRA's rounds begin with B = 0."""
    adapter = small.adapter()
    if method != "flora":
        return adapter
    return {**adapter, "layers": {n: pair.replace(b=0 * pair.b) for n, pair in adapter["layers"].items()}}


def client_of(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


def mean(trees, weights=WEIGHTS):
    return jax.tree.map(lambda *x: sum(w * y for w, y in zip(weights, x, strict=True)), *trees)


def products(before, uploads):
    return [exact.product(jax.tree.map(np.add, before.adapter, client_of(uploads, k))) for k in range(5)]


@pytest.mark.parametrize("method", ["fedex", "flora"])
def test_the_mean_of_all_products_is_in_base_and_adapter_exactly(method):
    for before, after, public in shown(method):
        expected = jax.tree.map(np.add, before.residual, mean(products(before, public["uploads"])))
        effective = jax.tree.map(np.add, after.residual, exact.product(after.adapter))
        jax.tree.map(close, effective, expected)
        head = mean([client_of(public["uploads"]["head"], k) for k in range(5)])
        jax.tree.map(lambda x, y, z: close(x, y + z), after.adapter["head"], before.adapter["head"], head)


def test_clients_train_on_the_base_that_the_residual_has_shifted():
    """Without noise: the second round's uploads follow from a base with the first one's residual merged in."""
    setup = small.Setup(method="fedex", plain=True)
    (_, middle, _), _ = shown("fedex")
    state, params, clients, data, keys = small.arguments(setup, [2], state=jax.tree.map(jnp.array, middle))
    model, _ = small.model_and_params()
    bare = state._replace(residual=jax.tree.map(jnp.zeros_like, state.residual))
    cases = (state, params), (bare, lora.shifted(model, params, middle.residual)), (bare, params)
    folded, direct, plain = (
        small.compiled(setup, 1)(jax.tree.map(jnp.copy, begun), base, clients, data, keys)[1][0]["uploads"]
        for begun, base in cases
    )
    jax.tree.map(close, folded, direct)
    assert max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (folded, plain)), strict=True)) > 1e-3


def test_fedex_keeps_fedavgs_factors_and_flora_begins_anew():
    (before, after, public), _ = shown("fedex")
    expected = mean([client_of(public["uploads"], k) for k in range(5)])
    jax.tree.map(lambda x, y, z: close(x, y + z), after.adapter, before.adapter, expected)
    (_, first, _), (_, second, _) = shown("flora")
    for name, pair in first.adapter["layers"].items():
        assert (pair.b == 0).all()
        assert (np.abs(pair.a) <= pair.a.shape[-1] ** -0.5).all()
        assert np.abs(pair.a - second.adapter["layers"][name].a).max() > 0.05
    a = [pair.a for pair in first.adapter["layers"].values()]
    assert np.abs(a[0] - a[1]).max() > 0.05


def test_flexlora_takes_the_best_factors_of_the_mean_product():
    for before, after, public in shown("flexlora"):
        for name, total in mean(products(before, public["uploads"])).items():
            u, s, v = np.linalg.svd(np.asarray(total), full_matrices=False)
            best = np.einsum("lir,lr,lro->lio", u[..., :2], s[:, :2], v[:, :2])
            close(exact.product(after.adapter)[name], best)
            first = {**after.adapter, "layers": {name: client_of_rank(after.adapter["layers"][name], 1)}}
            close(exact.product(first)[name], np.einsum("lir,lr,lro->lio", u[..., :1], s[:, :1], v[:, :1]))


def client_of_rank(pair, rank):
    return pair.replace(a=pair.a[:, :rank], b=pair.b[:, :, :rank])


def test_rolora_trains_the_halves_in_turn_and_the_other_has_neither_gradient_nor_noise():
    for (before, after, public), trained, other in zip(shown("rolora"), "ba", "ab", strict=True):
        for name in before.adapter["layers"]:
            half = lambda tree, letter, name=name: getattr(tree["layers"][name], letter)  # noqa: E731
            np.testing.assert_array_equal(half(after.adapter, other), half(before.adapter, other))
            for tree in public["uploads"], public["released"]:
                assert (half(tree, other) == 0).all()
                assert (np.abs(half(tree, trained)) > 0).all()
            close(
                half(after.adapter, trained) - half(before.adapter, trained),
                np.tensordot(WEIGHTS, half(public["uploads"], trained), 1),
            )


def test_rolora_clips_the_gradient_of_the_half_that_is_trained():
    """A loud record's gradient of B alone is cut to the clip norm: with A's in its norm, it would come to less."""
    setup, loud = small.Setup(method="rolora", plain=True), small.records()
    for record in loud:
        record["scale"][:] = 1e4
    quiet = [{name: array.copy() for name, array in shard.items()} for shard in loud]
    quiet[1]["scale"][0] = 0
    released = [small.run(setup, rounds=[1], data=data, noise_std=0)[1]["released"] for data in (loud, quiet)]
    moved = jax.tree.map(lambda x, y: (x - y)[0, 1, 0], *released)
    norm = np.sqrt(sum((leaf.astype(float) ** 2).sum() for leaf in jax.tree.leaves(moved)))
    assert norm == pytest.approx(small.CLIP / small.DIVISORS[1], rel=1e-4)


def test_fedsa_uploads_no_b_and_each_client_goes_on_from_its_own():
    (_, first, one), (_, second, two) = shown("fedsa")
    for name, pair in one["uploads"]["layers"].items():
        assert pair.b is None
        begun = small.adapter()["layers"][name].b
        step = lambda public, name=name: -small.RATES["layers"] * public["released"]["layers"][name].b.sum(1)  # noqa: E731
        close(first.own[name], begun + step(one))
        close(second.own[name], first.own[name] + step(two))
        close(second.adapter["layers"][name].b, np.tensordot(WEIGHTS, second.own[name], 1))
        close(
            second.adapter["layers"][name].a - first.adapter["layers"][name].a,
            np.tensordot(WEIGHTS, two["uploads"]["layers"][name].a, 1),
        )


def test_a_clients_own_b_decides_its_gradients_and_no_other_clients():
    setup = small.Setup(method="fedsa", plain=True)
    (_, state, _), _ = shown("fedsa")
    changed = state._replace(
        own={name: b * np.array([1, 1, 3, 1, 1]).reshape(5, 1, 1, 1) for name, b in state.own.items()}
    )
    runs = [
        small.run(setup, rounds=[2], state=jax.tree.map(jnp.array, s))[1]["released"]["head"] for s in (state, changed)
    ]
    moved = np.abs(runs[0]["kernel"] - runs[1]["kernel"])[0].reshape(5, -1).max(1)
    assert (moved > 0).tolist() == [False, False, True, False, False]


RANKS = (1, 2, 1, 2, 1)


def test_a_client_of_a_small_rank_has_no_gradient_and_no_noise_beyond_it():
    for _, _, public in shown("fedavg", ranks=RANKS):
        for tree, axes in (public["uploads"], 0), (public["released"], 1):
            for pair in tree["layers"].values():
                for beyond in (np.moveaxis(pair.a, 2 + axes, 0)[1], pair.b[..., 1]):
                    largest = np.abs(beyond.reshape(5, -1)).max(1)
                    assert (largest > 0).tolist() == [False, True, False, True, False]


def test_padding_takes_each_components_mean_over_those_who_train_it():
    (before, after, public), _ = shown("fedavg", ranks=RANKS)
    shares = np.array([WEIGHTS, WEIGHTS * (np.array(RANKS) == 2)])
    shares /= shares.sum(1, keepdims=True)
    for name, pair in public["uploads"]["layers"].items():
        a = np.einsum("rk,klri->lri", shares, pair.a)
        close(after.adapter["layers"][name].a, before.adapter["layers"][name].a + a)
        b = np.einsum("rk,klor->lor", shares, pair.b)
        close(after.adapter["layers"][name].b, before.adapter["layers"][name].b + b)


def test_clients_of_several_ranks_start_from_the_first_components():
    """A client of rank 1 trains as if there were no second component."""
    cut = small.adapter()
    cut = {**cut, "layers": {n: p.replace(a=p.a * [[1], [0]], b=p.b * [1, 0]) for n, p in cut["layers"].items()}}
    setup = small.Setup(plain=True, ranks=RANKS)
    init = lambda adapter: small.federation(setup).init(jax.tree.map(jnp.array, adapter), 5)  # noqa: E731
    uploads = [small.run(setup, rounds=[1], state=init(a))[1]["uploads"] for a in (small.adapter(), cut)]
    same = jax.tree.map(lambda x, y: np.abs(x - y)[0].reshape(5, -1).max(1), *uploads)
    same = np.max(jax.tree.leaves(same), 0)
    assert (same[[0, 2, 4]] < 1e-6).all()
    assert (same[[1, 3]] > 1e-3).all()


def test_a_whole_adapter_does_what_adapter_and_residual_do():
    (_, _, _), (_, state, _) = shown("fedex")
    adapter, rank = exact.whole(state.adapter, state.residual)
    effective = jax.tree.map(np.add, state.residual, exact.product(state.adapter))
    jax.tree.map(close, exact.product(adapter), effective)
    assert 2 < rank <= 16
    assert jax.tree.leaves(adapter["layers"])[0].shape[1] == rank
    jax.tree.map(np.testing.assert_array_equal, adapter["head"], state.adapter["head"])


@pytest.mark.parametrize("method", mostly_slow([], ["rolora", "fedsa", "fedex"]))
def test_the_mesh_changes_nothing_of_any_method(method):
    """Padding clients are in no mean, product or half."""
    _, (before, after, public) = shown(method)
    state = jax.tree.map(jnp.array, before)
    other = small.run(small.Setup(4, 2, 2, method=method, plain=True), rounds=[2], state=state)
    jax.tree.map(close, other[:2], (after, jax.tree.map(lambda x: x[None], public)))
