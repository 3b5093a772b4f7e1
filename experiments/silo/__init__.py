"""A federation of parties that share no machine, one command for each thing that a party does:

    python -m experiments.silo keys --name=north --data_dir=... --workdir=silo   this party's keys and its public card
    python -m experiments.silo plan --sites=A.json,B.json --workdir=coordinator  the plan, from public cards and settings
    python -m experiments.silo check plan.json --data_dir=... --workdir=silo     hold the plan against one's own house
    python -m experiments.silo serve plan.json --data_dir=... --workdir=silo     answer the coordinator's requests
    python -m experiments.silo relay plan.json --at=HOST:PORT                    carry bytes between a site and the mailbox
    python -m experiments.silo coordinate plan.json --workdir=coordinator        send, sum and step

docs/silos.md takes three parties through them. Exit codes are those of a run; 69 says that a site is missing.
"""

import os
import sys

from dplora_jax import guard
from dplora_jax.errors import InputError
from experiments import cli
from experiments.cli import exits

COMMANDS = "keys", "plan", "check", "serve", "relay", "coordinate"
OF_A_SITE = "keys", "check", "serve"


@exits.guarded
def main(arguments=None):
    """Run the command line -> exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] not in COMMANDS:
        if arguments and arguments[0] in ("--help", "-h"):
            print(__doc__)
            return 0
        raise InputError(f"give one of {', '.join(COMMANDS)}: python -m experiments.silo COMMAND [PLAN] [flags].")
    guard.begin(phrase=cli.as_flags)
    if arguments[0] in OF_A_SITE:
        os.umask(0o077)  # whatever a site writes is its own user's alone
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise InputError("the package cryptography is missing: pip install -e '.[silo]'.") from None
    from importlib import import_module

    return import_module(f"experiments.silo.{arguments[0]}").main(arguments[1:])
