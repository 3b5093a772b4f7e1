"""Federated, differentially private LoRA fine-tuning of language models, as pure JAX functions.

The public names are loaded when they are first used: `Federation` and `Silo`, and the configuration's dataclasses.
"""

import importlib

_PUBLIC = {
    "Federation": "dplora_jax.federation.federation",
    "Silo": "dplora_jax.federation.silo",
    "Server": "dplora_jax.federation.silo",
    "LoraConfig": "dplora_jax.lora",
    **dict.fromkeys(
        (
            *("FederationConfig", "RunConfig", "Lora", "Privacy", "PrivateTest", "Schedule", "Optimizer"),
            *("Aggregation", "Execution"),
        ),
        "dplora_jax.config",
    ),
}
__all__ = sorted(_PUBLIC)


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__():
    return sorted({*globals(), *_PUBLIC})
