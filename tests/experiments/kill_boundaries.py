"""The boundaries of a dispatch at which `kill_stress` ends a run: its calls, and lines of its ledger half written."""

import json
import os
import signal

from dplora_jax import checkpoint
from dplora_jax.federation import dispatch, workdir_files
from dplora_jax.privacy import chain, secrets
from dplora_jax.privacy.ledger import Ledger
from experiments import report

# Where a start may end its own life: name -> (owner, function, before or after it).
CALLS = {
    "before begin": (Ledger, "begin", "before"),
    "written, not promised": (chain, "replace_durably", "before"),
    "before the run": (dispatch, "execute", "before"),
    "after the run": (dispatch, "execute", "after"),
    "checkpoint under way": (checkpoint.Checkpoints, "save", "after"),
    "before commit": (Ledger, "commit", "before"),
    "before metrics": (workdir_files, "write_metrics", "before"),
    "after metrics": (workdir_files, "write_metrics", "after"),
    "before the report": (report, "write", "before"),
    "before the secrets go": (secrets, "destroy", "before"),
}
TORN = {"torn begin": "begin", "torn commit": "commit", "torn end": "end"}
# One kill at each boundary between begin, run, checkpoint and commit, in an order in which they are met: (name, at which call of
# a start).
IN_ORDER = [
    ("torn begin", 1), ("written, not promised", 1), ("before the run", 1), ("after the run", 1), ("checkpoint under way", 1),
    ("before commit", 1), ("torn commit", 1), ("before metrics", 2), ("torn end", 1),
]  # fmt: skip


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(name, nth):
    """Make the nth meeting with a boundary the last thing that this process does."""
    calls = iter(range(1, 1 << 30))
    if name in TORN:
        real = chain.Chain.append

        def torn(self, **entry):
            if entry["entry"] == TORN[name] and next(calls) == nth:
                line = json.dumps({"previous": self.heads[-1], **entry}).encode()
                with open(self.path, "ab", buffering=0) as file:
                    file.write(line[: len(line) // 2])
                die()
            real(self, **entry)

        chain.Chain.append = torn
        return
    owner, function, when = CALLS[name]
    real = getattr(owner, function)

    def wrapped(*arguments, **named):
        last = next(calls) == nth
        if last and when == "before":
            die()
        result = real(*arguments, **named)
        if last:
            die()
        return result

    setattr(owner, function, wrapped)
