"""How a round's uploads come together over its attempts, at the coordinator."""

import numpy as np

from dplora_jax.errors import InputError


class Stopped(InputError):
    """The federation cannot go on as it is; what is saved stays."""

    code = 69  # EX_UNAVAILABLE of sysexits.h: another party is missing


class Alone:
    """Uploads that stand for themselves: what came counts, and what was lost is asked for again of that site alone."""

    dtype = "<f4"

    def __init__(self, survivors):
        self.replies = {}

    def todo(self, attempts):
        """[(a request's bytes, whom to ask)] of this round's `attempts` so far, [(request's bytes, peers)]: each site by the
        newest that it is in."""
        later = [frozenset().union(*(peers for _, peers in attempts[index + 1 :])) for index in range(len(attempts))]
        return [(data, peers - newer) for (data, peers), newer in zip(attempts, later, strict=True) if peers - newer]

    def needed(self, peers):
        """Those of `peers` without whom an attempt is not waited for."""
        return frozenset()

    def take(self, peers, fine, again, missing, names):
        """Take the good replies `fine` {site: Reply} of an attempt of `peers` -> who is asked in another one, or nobody. `again`
        have to be asked again, `missing` did not answer in time. Raises Stopped, by `names(sites)`, where nothing came."""
        self.replies |= fine
        if not again and not self.replies:
            raise Stopped(f"no upload came: {names(missing)} did not answer.")
        return frozenset(again)

    def uploads(self):
        """{site: what it sent}."""
        return {site: np.frombuffer(reply.payload, self.dtype) for site, reply in self.replies.items()}


class Together(Alone):
    """Masked uploads, which mean nothing but all together: an attempt that lacks one is followed by one of those that are there,
    at least `survivors`."""

    dtype = "<u4"

    def __init__(self, survivors):
        super().__init__(survivors)
        self.survivors = survivors

    def todo(self, attempts):
        """The newest attempt alone."""
        return attempts[-1:]

    def needed(self, peers):
        """All of them."""
        return peers

    def take(self, peers, fine, again, missing, names):
        """As `Alone.take`."""
        if set(fine) == peers:
            self.replies = fine
            return frozenset()
        there = peers if again else peers - missing
        if len(there) < self.survivors:
            raise Stopped(
                f"{names(missing)} did not answer, and without them fewer sites are left than survivors={self.survivors}."
            )
        return there
