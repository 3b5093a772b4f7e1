"""The private step: clipping, noise, sampling, accounting, secrets and the ledger. It knows pytrees and losses, no model."""
