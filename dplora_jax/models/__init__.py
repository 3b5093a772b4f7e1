"""Language models as pure functions: `from_pretrained`, `load_tokenizer`, `file_digests`, and a module for each family."""

from dplora_jax.models.pretrained import file_digests, from_pretrained
from dplora_jax.models.tokenizer import load_tokenizer

__all__ = ["file_digests", "from_pretrained", "load_tokenizer"]
