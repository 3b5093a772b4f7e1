"""Trust mode `local`, the paper's: everyone may see every upload, and each client's own noise carries its whole guarantee."""

from dplora_jax.federation.trust.mode import (
    HOSTS,
    OWN_MACHINES,
    Mode,
    accounting,
    per_example_clipping,
    protected,
    public,
)
from dplora_jax.privacy import paper_bound


def _statements(config, apart):
    return (
        "Who sees what: everyone may see every upload of every client. The server is honest but curious, and so are the other "
        "clients and the public. Each client's own noise carries its whole guarantee.",
        protected(config),
        public(config),
        f"Secret by assumption: each client's 256-bit key. {OWN_MACHINES if apart else HOSTS}",
    )


def _accounting(config, mechanisms, steps):
    return f"{accounting(config)} {paper_bound.sentence(mechanisms, steps, config.privacy.delta)}"


MODE = Mode(
    "local",
    statements=_statements,
    method=lambda config, apart: [per_example_clipping(config)],
    accounting=_accounting,
)
