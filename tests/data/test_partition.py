"""Dealing records to clients."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dplora_jax.data import partition as module
from dplora_jax.data.partition import group_column, partition
from dplora_jax.errors import InputError

LABELS = np.arange(600) % 3
GROUPS = tuple("xyz"[i % 3] for i in range(600))


@settings(max_examples=30, deadline=None)
@given(
    spec=st.sampled_from(["iid", "dirichlet:0.3", "dirichlet:100", "column:bank"]),
    clients=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_every_record_has_exactly_one_client(spec, clients, seed):
    clients = 3 if spec.startswith("column") else clients
    parts = partition(spec, LABELS, GROUPS, clients, seed)
    assert len(parts) == clients
    assert all(len(part) and np.all(np.diff(part) > 0) for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))


def test_iid_sizes_differ_by_at_most_one():
    sizes = [len(part) for part in partition("iid", LABELS[:101], None, 4, 0)]
    assert sorted(sizes) == [25, 25, 25, 26]


def test_partition_follows_the_seed_alone():
    for spec in ("iid", "dirichlet:1"):
        first, again, other = (partition(spec, LABELS, None, 4, seed) for seed in (1, 1, 2))
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_small_alpha_skews_labels_and_large_alpha_does_not():
    def largest_share(spec):
        parts = partition(spec, LABELS, None, 3, 0)
        return np.mean([np.bincount(LABELS[part], minlength=3).max() / len(part) for part in parts])

    assert largest_share("dirichlet:0.1") > 0.7
    assert largest_share("dirichlet:1000") < 0.4


def test_column_gives_each_value_a_client_in_sorted_order():
    parts = partition("column:bank", np.zeros(5), ["b", "c", "a", "b", "c"], 3, 0)
    assert [part.tolist() for part in parts] == [[2], [0, 3], [1, 4]]


def test_group_column_is_asked_for_by_column_specs_only():
    assert group_column("column:bank") == "bank"
    assert group_column("column:a:b") == "a:b"
    assert group_column("iid") is None
    assert group_column("dirichlet:1") is None


@pytest.mark.parametrize(
    ("spec", "groups", "clients", "said"),
    [
        ("iid", None, 0, "at least 1"),
        ("iid", None, 601, "600 training records"),
        ("iid:3", None, 2, "malformed"),
        ("even", None, 2, "malformed"),
        ("", None, 2, "malformed"),
        ("dirichlet", None, 2, "positive number"),
        ("dirichlet:x", None, 2, "positive number"),
        ("dirichlet:0", None, 2, "positive number"),
        ("dirichlet:-1", None, 2, "positive number"),
        ("dirichlet:nan", None, 2, "positive number"),
        ("dirichlet:inf", None, 2, "positive number"),
        ("dirichlet:1e-3", None, 20, "without a record"),
        ("dirichlet:1e-320", None, 20, "without a record"),
        ("column:", GROUPS, 3, "names no column"),
        ("column:bank", None, 3, "does not have"),
        ("column:bank", GROUPS, 4, "3 distinct values"),
    ],
)
def test_what_cannot_be_dealt_is_one_sentence(spec, groups, clients, said):
    with pytest.raises(InputError, match=said) as caught:
        partition(spec, LABELS, groups, clients, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dealt", [[[0, 1], [1, 2]], [[0], [2]], [[0, 1], [2, 3]]])
def test_a_record_that_two_clients_would_have_or_none_stops_the_run(dealt, monkeypatch):
    monkeypatch.setattr(module, "_by_group", lambda *_: [np.array(part) for part in dealt])
    with pytest.raises(RuntimeError, match="to two clients, or to none"):
        partition("column:bank", np.zeros(3), "aab", 2, 0)
