"""Ways from what clients send to the next adapter by name: a new one is a file with a `Method`, and a line here."""

from dplora_jax.federation.methods import fedavg, fedex, fedsa, flexlora, flora, rolora

BY_NAME = {module.METHOD.name: module.METHOD for module in (fedavg, rolora, fedsa, fedex, flora, flexlora)}
