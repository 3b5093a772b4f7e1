"""How a round's uploads come together over its attempts, at the coordinator. `Alone` and `Together` have one interface."""

import numpy as np

from dplora_jax.errors import InputError


class Stopped(InputError):
    """The federation cannot go on as it is; what is saved stays."""

    code = 69  # EX_UNAVAILABLE of sysexits.h: another party is missing


class Alone:
    """Uploads that stand for themselves: what came counts, and what was lost is asked for again of that site alone. At `least` so
    many must come. `replies` are those that count, {site: Reply}."""

    dtype = "<f4"

    def __init__(self, least):
        self.least, self.replies = least, {}

    def todo(self, attempts):
        """[(a request's bytes, whom to ask)] of this round's `attempts` so far, [(request's bytes, peers)]: each site by the
        newest that it is in."""
        later = [frozenset().union(*(peers for _, peers in attempts[index + 1 :])) for index in range(len(attempts))]
        return [(data, peers - newer) for (data, peers), newer in zip(attempts, later, strict=True) if peers - newer]

    def needed(self, peers):
        """Those of `peers` without whom an attempt is not waited for: nobody."""
        return frozenset()

    def take(self, peers, fine, again, missing):
        """Take the good replies `fine` {site: Reply} of an attempt of `peers`, of whom `again` (a set) have to be asked again and
        `missing` did not answer in time -> who is asked in another attempt; nobody where this was the last."""
        self.replies |= fine
        return frozenset(again)

    def uploads(self):
        """{site: what it sent}."""
        return {site: np.frombuffer(reply.payload, self.dtype) for site, reply in self.replies.items()}


class Together:
    """Masked uploads, which mean nothing but all together: an attempt that lacks one is followed by one of those that are there,
    at `least` so many."""

    dtype = "<u4"

    def __init__(self, least):
        self.least, self.replies = least, {}

    def todo(self, attempts):
        """The newest attempt alone."""
        return attempts[-1:]

    def needed(self, peers):
        """All of them."""
        return peers

    def take(self, peers, fine, again, missing):
        """As `Alone.take`."""
        if set(fine) == peers:
            self.replies = fine
            return frozenset()
        there = peers if again else peers - missing
        return there if len(there) >= self.least else frozenset()

    uploads = Alone.uploads
