"""Where the coordinator and an engine meet: the request that waits for each site, and the replies that came.

The engine's threads call `exchange` for a site as often as they like, and get the same request until it is answered: nothing is
lost with an engine that dies, and a site that is asked twice answers with the same bytes.
"""

import threading

from dplora_jax.silos import messages


class Office:
    """Requests out and replies in, of so many `sites`."""

    def __init__(self, sites):
        self._changed = threading.Condition()
        self._requests = [None] * sites
        self._replies = {}  # the newest of each site: one that floods floods itself

    def post(self, site, request):
        """Have `request` (bytes) wait for `site`, in place of an earlier one; None takes it back."""
        with self._changed:
            self._requests[site] = request
            self._changed.notify_all()

    def receive(self, seconds):
        """The next (site, reply in bytes); None if none comes within so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._replies, seconds)
            site = next(iter(self._replies), None)
            return None if site is None else (site, self._replies.pop(site))

    def exchange(self, site, reply, seconds):
        """For engines: leave the `reply` of `site` (b"" where there is none), and take the request that waits for it, or
        b"" if none comes within so many seconds."""
        with self._changed:
            if reply:
                if self._requests[site] and messages.answered(reply) == messages.digest(self._requests[site]):
                    self._requests[site] = None
                self._replies[site] = reply
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._requests[site] is not None, seconds)
            return self._requests[site] or b""
