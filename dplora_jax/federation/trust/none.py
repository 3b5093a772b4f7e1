"""Trust mode `none`: no noise and no privacy, a control."""

from dplora_jax.federation.trust.mode import Mode, accounting

STATEMENTS = (
    "There is NO privacy: no noise is added, and the adapter may reveal the training records. This mode exists as a control.",
)

MODE = Mode(
    "none",
    statements=lambda config, apart: STATEMENTS,
    method=lambda config, apart: ["Federated LoRA, no noise"],
    accounting=lambda config, mechanisms, steps: accounting(config),
    private=False,
)
