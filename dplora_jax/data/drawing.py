"""Draws that are the same in every version of Python: only `random()` is promised to give the same numbers."""


def pick(rng, items):
    """One of `items`."""
    return items[int(rng.random() * len(items))]


def between(rng, low, high):
    """A whole number from `low` to `high`, both included."""
    return low + int(rng.random() * (high - low + 1))


def shuffled(rng, items):
    """`items` in random order, as a list."""
    items = list(items)
    for i in range(len(items) - 1, 0, -1):
        j = between(rng, 0, i)
        items[i], items[j] = items[j], items[i]
    return items
