"""Many clients of different sizes, accounted as a few dozen: a class of sizes shares one mechanism."""

import math

MOST = 32  # distinct sizes that are each accounted on their own
CLASSES = (
    24  # of more sizes, at most: a client takes part at most a 23rd of the sizes' range (in logarithms) more often
)


def bounds_by_size(sizes, expected_batch_size):
    """{size: (smallest, largest) of its class}; a class of its own for each where there are at most MOST distinct sizes.

    A client of n records is sampled as one of n' = `largest`, the n' - n missing ones null records that contribute nothing, at
    rate min(1, expected_batch_size / smallest): its mechanism is exactly that of n' records, whatever n. Sizes that join
    whole are one class (at rate 1 the size costs nothing); the others are cut on a geometric grid.

    >>> bounds_by_size((40, 50, 200), 64)
    {40: (40, 40), 50: (50, 50), 200: (200, 200)}
    """
    distinct = sorted(set(sizes))
    if len(distinct) <= MOST:
        return {size: (size, size) for size in distinct}
    sampled = [size for size in distinct if size > expected_batch_size]
    low, high = math.log(max(distinct[0], expected_batch_size)), math.log(distinct[-1])

    def number(size):
        if not sampled or size < sampled[0]:
            return -1
        return min(int((math.log(size) - low) / (high - low) * (CLASSES - 1)), CLASSES - 2)

    classes = {}
    for size in distinct:
        classes.setdefault(number(size), []).append(size)
    return {size: (members[0], members[-1]) for members in classes.values() for size in members}
