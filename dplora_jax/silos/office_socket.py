"""The Unix socket at which an engine's process meets the coordinator's office. No library but Python's own: an engine has an
environment of its own, with none of this project's dependencies."""

import math
import struct
import time

from dplora_jax.silos import frames

SITE = struct.Struct("<H")  # the site's number, before its reply
POLL = 10.0  # seconds that a request is waited for before an empty answer
MOST = 2**31 - 1  # bytes of a message: an engine knows no plan, and is told by parties that do
PAUSE = 2.0  # seconds after a fault before the next attempt


def exchange(path, site, reply):
    """Leave the `reply` of `site` (b"" where there is none) at the office's socket `path`, and take the request that waits for
    the site, or b"" if none comes within POLL. Raises OSError."""
    return frames.ask(path, SITE.pack(site) + reply, MOST, POLL + frames.SECONDS)


def carry(path, site, ask, stop=lambda: False, patience=math.inf, say=lambda text: None):
    """Carry requests for `site` to `ask(request) -> reply`, and its replies to the office at `path`, until `stop()`, or until the
    office has been away for `patience` seconds.

    An empty reply says that none came: the office gives the same request again, after a pause. So it does for a reply that did
    not reach it, be it away or the reply too large. What `ask` raises ends this.
    """
    reply, away = b"", None
    while not stop():
        try:
            request, away = exchange(path, site, reply), None
        except OSError as error:
            away = away or time.monotonic()
            if time.monotonic() - away > patience:
                return
            say(f"{path}: trying again ({type(error).__name__}: {error.strerror or error})")
            time.sleep(PAUSE)
            request = b""
        reply = ask(request) if request else b""
        if request and not reply:
            time.sleep(PAUSE)
