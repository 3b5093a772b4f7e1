"""What rounds draw from, by the clients' secrets: keys of the device's generator or the host's own draws, and who takes part."""

from dplora_jax.federation import participants, trust_modes
from dplora_jax.privacy import host_noise, secrets


def of_rounds(config, prepared, held, rounds, attempt):
    """The draws of rounds [a, b) of `prepared` (`setup.Prepared`), by the secrets `held`: `secrets.round_keys`, or with hardened
    noise `host_noise.round_draws`; and "joins" where not everyone takes part in each round."""
    numbers = range(*rounds)
    if config.privacy.noise != "hardened":
        keys = secrets.round_keys(held, numbers, attempt, config.schedule.clients, trust_modes.joining(config))
    else:
        local = prepared.federation.local
        stds = [m.noise_multiplier * 2.0**local.bits for m in prepared.mechanisms]
        adapter = prepared.state.adapter
        keys = host_noise.round_draws(held, numbers, attempt, local.local_steps, adapter, stds, local.records)
    if participants.partial(config):
        keys["joins"] = participants.joins(config, held, numbers, attempt)
    return keys
