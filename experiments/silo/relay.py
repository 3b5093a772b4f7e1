"""A site's relay to the mailbox: it carries bytes, knows no key but its own of TLS, and needs no JAX."""

import pathlib
import sys

from absl import flags

from dplora_jax.errors import InputError
from dplora_jax.silos import frames, keys, mailbox
from experiments.silo import options


def main(arguments):
    """Run the command line -> exit code; it ends by a signal alone."""
    values = flags.FlagValues()
    flags.DEFINE_string("at", None, "HOST:PORT of the coordinator's mailbox", flag_values=values)
    flags.DEFINE_string("socket", "silo/site.sock", "Unix socket of the site's process", flag_values=values)
    flags.DEFINE_string("relay", "silo/relay", "folder with the relay's TLS key and certificate", flag_values=values)
    path, values = options.read_alone("relay", arguments, values)
    made, folder = options.planned(path), pathlib.Path(values.relay)
    for name in (keys.TLS_KEY, keys.CERTIFICATE):
        if not (folder / name).exists():
            raise InputError(f"{folder / name} does not exist: give the folder `relay` of the party's keys.")
    mailbox.relay(
        options.address(values.at, "at"), folder / keys.TLS_KEY, folder / keys.CERTIFICATE,
        made.coordinator["certificate"], lambda request: frames.ask(values.socket, request, made.reply_size()),
        made.request_size(), say=lambda text: print(f"relay: {text}", file=sys.stderr, flush=True),
    )  # fmt: skip
    return 0
