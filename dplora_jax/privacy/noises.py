"""The kinds of noise by name: a new kind is a file with a `noise.Noise`, and a line here. No JAX until one is looked up."""

import importlib

# name: the module and the class in it
KINDS = {
    "independent": ("dplora_jax.privacy.noise", "Independent"),
    "banded": ("dplora_jax.privacy.banded", "Banded"),
    "hardened": ("dplora_jax.privacy.hardened", "Hardened"),
}


def kind(name):
    """The class of the kind of noise that is called `name`."""
    module, attribute = KINDS[name]
    return getattr(importlib.import_module(module), attribute)
