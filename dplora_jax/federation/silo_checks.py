"""What parties that share no machine cannot do; no JAX."""

from dplora_jax.errors import InputError
from dplora_jax.federation import methods, participation, trust


def check(config):
    """Raise InputError where silos cannot run `config` (settled)."""
    mode, method = trust.mode(config), methods.BY_NAME[config.aggregation.method]
    if not mode.apart:
        raise InputError(f"trust={mode.name} is not for silos: its server would see whole updates. Use trust=local.")
    if mode.masked and config.privacy.noise != "hardened":
        raise InputError(f"trust={mode.name} between silos sums integers under masks: use noise=hardened.")
    if method.personal or config.lora.ranks is not None:
        raise InputError(
            "silos share one adapter of one rank: leave out `ranks`, and any aggregation that keeps a part of the "
            f"adapter at each client (here {method.name})."
        )
    if config.private_test.share:
        raise InputError(
            "silos send uploads and no scores: leave out `private_test`, and let the coordinator measure on a public test set."
        )
    if config.privacy.noise == "banded_rounds":
        raise InputError(
            "silos may be asked for a round again, or not at all, and noise=banded_rounds takes each round once: use another "
            "noise."
        )
    if participation.scheduled(config) or config.schedule.dropout:
        raise InputError(
            "silos follow no schedule, since the server asks them for uploads as it goes: leave out `participation` and "
            "`dropout`."
        )
