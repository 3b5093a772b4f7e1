"""What rounds draw from, by the clients' secrets: keys of the device's generator or the host's own draws, and who takes part."""

from dplora_jax.federation import participants, trust_modes


def of_rounds(config, prepared, held, rounds, attempt):
    """The draws of rounds [a, b) of `prepared` (`setup.Prepared`), by the secrets `held`: as its noise makes them
    (`noise.Noise.round_keys`), and "joins" where not everyone takes part in each round."""
    numbers = range(*rounds)
    local, rate = prepared.rounds.local, trust_modes.mode(config).joining(config)
    keys = local.noise.round_keys(
        held, numbers, attempt, config.schedule.clients, rate, local, prepared.mechanisms, prepared.state.adapter
    )
    if participants.partial(config):
        keys["joins"] = participants.joins(config, held, numbers, attempt)
    return keys
