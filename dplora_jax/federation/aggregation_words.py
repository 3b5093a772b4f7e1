"""How uploads are put together, in words: for config.json and the report."""

from dplora_jax.federation import methods, participation


def lines(config):
    """A line for each flag that says so."""
    method = methods.BY_NAME[config.aggregation.method]
    lines = [method.words]
    if config.aggregation.robust != "none":
        lines = [
            f"{config.aggregation.robust.replace('_', ' ')} of each coordinate, every client counting the same (Yin et al. 2018)"
        ]
    if config.lora.ranks is not None:
        lines.append(f"clients of ranks {config.lora.ranks}")
    if participation.scheduled(config):
        lines.append(
            f"participation {config.schedule.participation} by a public schedule: each client pays for its own rounds"
        )
    if config.schedule.dropout:
        lines.append(
            f"clients fail to send with probability {config.schedule.dropout:g} (simulated), and pay all the same"
        )
    if config.optimizer.proximal:
        lines.append(f"FedProx, strength {config.optimizer.proximal:g}")
    head_words = " on the head alone" if method.settled else ""
    if config.aggregation.server_optimizer != "sgd":
        lines.append(
            f"Fed{config.aggregation.server_optimizer.capitalize()} at the server{head_words} (Reddi et al. 2021)"
        )
    if config.aggregation.server_momentum and head_words:
        lines.append(f"server momentum {config.aggregation.server_momentum:g}{head_words}")
    if config.aggregation.upload_bits:
        lines.append(f"uploads rounded at random to {config.aggregation.upload_bits} bits a number")
    return lines
