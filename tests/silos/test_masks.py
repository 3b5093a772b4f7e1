"""Masks cancel in the whole sum, hide every part of it, and are never the same for two requests."""

import itertools

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scipy import stats

from dplora_jax.silos import masks

COUNT = 40_000
KEYS = [X25519PrivateKey.from_private_bytes(bytes([number + 1] * 32)) for number in range(4)]
PLAN, REQUEST = b"p" * 32, b"r" * 32


def mask(number, peers=(0, 1, 2), plan=PLAN, request=REQUEST):
    others = {peer: KEYS[peer].public_key() for peer in peers if peer != number}
    return masks.mask(KEYS[number], number, others, plan, request, COUNT)


def integers(seed):
    """Such as a site's share has: far from uniform on 32 bits."""
    return np.random.default_rng(seed).integers(-1000, 1000, COUNT).astype(np.int32)


def uniform(words):
    """The p-value of words being uniform: of their upper and of their lower eight bits."""
    return min(
        stats.chisquare(np.bincount((words >> shift & 255).astype(int), minlength=256)).pvalue for shift in (24, 0)
    )


def test_the_masks_of_all_peers_cancel_and_the_total_is_that_of_the_integers():
    parts = [integers(number) for number in range(3)]
    hidden = [masks.hide(part, mask(number)) for number, part in enumerate(parts)]
    np.testing.assert_array_equal(masks.total(hidden), np.sum(parts, axis=0))
    extreme = [np.array([2**31 - 1, -(2**31), -5] + [0] * (COUNT - 3), np.int32), np.full(COUNT, -1, np.int32)]
    wrapped = masks.total([masks.hide(part, mask(number, (0, 1))) for number, part in enumerate(extreme)])
    assert wrapped[:3].tolist() == [2**31 - 2, 2**31 - 1, -6]  # modulo 2^32


def test_a_total_that_lacks_one_share_is_uniform():
    """And so is every share; the integers themselves would fail this at once."""
    hidden = [masks.hide(integers(number), mask(number)) for number in range(3)]
    assert uniform(integers(0).view(np.uint32)) < 1e-12
    for number in range(3):
        assert uniform(hidden[number]) > 1e-4
    for left, right in itertools.combinations(hidden, 2):
        assert uniform(left + right) > 1e-4
    assert uniform(np.sum(hidden, axis=0, dtype=np.uint32)) < 1e-12


@pytest.mark.parametrize(
    "changed", [{"request": b"s" * 32}, {"plan": b"q" * 32}, {"peers": (0, 1, 3)}, {"peers": (0, 1)}]
)
def test_no_other_request_plan_or_peers_have_the_same_mask(changed):
    """The difference of two masks would be that of two shares' integers, without any mask."""
    assert uniform(mask(0) - mask(0, **changed)) > 1e-4


def test_two_pairs_of_one_request_share_no_words():
    pairs = [
        masks.mask(KEYS[a], a, {b: KEYS[b].public_key()}, PLAN, REQUEST, COUNT) for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    for left, right in itertools.combinations(pairs, 2):
        assert uniform(left - right) > 1e-4
        assert uniform(left + right) > 1e-4


def test_one_who_lacks_the_secret_of_a_pair_cannot_make_its_mask():
    other = masks.mask(KEYS[3], 0, {1: KEYS[1].public_key(), 2: KEYS[2].public_key()}, PLAN, REQUEST, COUNT)
    assert uniform(mask(0) - other) > 1e-4
