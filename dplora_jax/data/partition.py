"""Deals records to clients.

This simulates parties: whoever deals reads the whole table. In a deployment each party has its own records
(`partition=folders`). The sizes of the clients are public (sampling rates and weights come from them).
"""

import numpy as np

from dplora_jax.errors import InputError

MAX_DIRICHLET_DRAWS = 100
FOLDERS = "folders"  # not dealt: each client's table is its own, and `folders.read` reads it


def group_column(spec: str) -> str | None:
    """The column whose values `partition` needs as `groups`: NAME of `column:NAME`, and None for the other kinds."""
    kind, _, argument = spec.partition(":")
    if kind != "column":
        return None
    if not argument:
        raise InputError(f"partition={spec} names no column; write column:NAME.")
    return argument


def partition(spec: str, labels: np.ndarray, groups, clients: int, seed: int, units=None) -> list[np.ndarray]:
    """The records of each client: `clients` sorted arrays of indices into `labels` [N], disjoint and covering all.

    `spec` is one of
      iid: at random, sizes differing by one at most;
      dirichlet:ALPHA: for each label, its shares of the clients are drawn from Dirichlet(ALPHA, ..., ALPHA), after Hsu,
        Qi and Brown (2019, arXiv 1909.06335) as federated benchmarks do it; drawn again while a client has no record;
      column:NAME: one client for each distinct value of `groups` [N], in sorted order.
    With `units` [N], iid and dirichlet deal whole units, by each one's commonest label, so that nobody is at two clients.

    >>> [part.tolist() for part in partition("column:bank", np.zeros(4), ["b", "a", "b", "a"], clients=2, seed=0)]
    [[1, 3], [0, 2]]

    Raises:
      InputError: on a malformed spec, fewer than one client, more clients than records, a client that would be empty,
        or groups that are absent or not as many as the clients.
    """
    if units is not None and not spec.startswith("column"):
        _, numbers = np.unique(np.asarray(units), return_inverse=True)
        commonest = [np.bincount(of_one).argmax() for of_one in _split_by(np.asarray(labels), numbers)]
        parts = _dealt(spec, np.array(commonest), None, clients, seed, "units of the training table")
        return [np.flatnonzero(np.isin(numbers, part)) for part in parts]
    return _dealt(spec, labels, groups, clients, seed, "training records")


def _dealt(spec, labels, groups, clients, seed, what):
    total = len(labels)
    if clients < 1:
        raise InputError(f"clients={clients} must be at least 1.")
    if clients > total:
        raise InputError(f"clients={clients} is more than the {total} {what}; use fewer clients.")
    kind, _, argument = spec.partition(":")
    rng = np.random.default_rng(seed)
    if spec == "iid":
        parts = np.array_split(rng.permutation(total), clients)
    elif kind == "dirichlet":
        parts = _by_label(spec, _alpha(spec, argument), np.asarray(labels), clients, rng)
    elif kind == "column":
        parts = _by_group(group_column(spec), groups, clients, total)
    else:
        raise InputError(f"partition={spec} is malformed; write iid, dirichlet:ALPHA, column:NAME or folders.")
    if not np.array_equal(np.sort(np.concatenate(parts)), np.arange(total)):
        # Each client's epsilon is that of its own records: one that two clients train on would pay for both.
        raise RuntimeError("a record was dealt to two clients, or to none: this is a fault of the program.")
    return [np.sort(part) for part in parts]


def _split_by(values, numbers):
    """`values` [N] as one array for each of `numbers` [N], in the order of these."""
    order = np.argsort(numbers, kind="stable")
    return np.split(values[order], np.cumsum(np.bincount(numbers))[:-1])


def _alpha(spec: str, argument: str) -> float:
    try:
        alpha = float(argument)
    except ValueError:
        alpha = 0.0
    if not 0 < alpha < float("inf"):
        raise InputError(f"partition={spec} needs a positive number, as in dirichlet:0.5.")
    return alpha


def _by_label(spec: str, alpha: float, labels: np.ndarray, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    for _ in range(MAX_DIRICHLET_DRAWS):
        parts = [[] for _ in range(clients)]
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(clients, alpha))
            # A tiny alpha underflows to no share at all for anyone; no cut may then pass the end.
            cuts = np.rint(np.nan_to_num(np.cumsum(shares)[:-1]) * len(rows)).astype(int).clip(0, len(rows))
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.append(piece)
        dealt = [np.concatenate(part) for part in parts]
        if min(len(part) for part in dealt) > 0:
            return dealt
    raise InputError(
        f"partition={spec} left one of {clients} clients without a record in {MAX_DIRICHLET_DRAWS} draws; "
        "use a larger ALPHA or fewer clients."
    )


def _by_group(name: str, groups, clients: int, total: int) -> list[np.ndarray]:
    if groups is None:
        raise InputError(f"partition=column:{name} needs a table with that column, which this dataset does not have.")
    if len(groups) != total:
        raise ValueError(f"{len(groups)} groups for {total} records")
    values, codes = np.unique(np.asarray(groups), return_inverse=True)
    if len(values) != clients:
        raise InputError(f"partition=column:{name} has {len(values)} distinct values; give clients={len(values)}.")
    return [np.flatnonzero(codes == code) for code in range(clients)]
