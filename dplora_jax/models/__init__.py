"""Language models as pure functions: `from_pretrained`, `load_tokenizer`, and a module for each family."""

from dplora_jax.models.pretrained import from_pretrained
from dplora_jax.models.tokenizer import load_tokenizer

__all__ = ["from_pretrained", "load_tokenizer"]
