"""What a GGUF file says before its data: metadata, and where each tensor lies, checked against the file's length.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. It is parsed by `gguf_reader`, not by
gguf.GGUFReader, which keeps an array object for each token and merge (seconds and hundreds of megabytes on a large vocabulary).
"""

import math
import mmap
import struct

import jax.numpy as jnp
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from dplora_jax.errors import InputError, storage
from dplora_jax.models import gguf_reader, registry

AS_STORED = {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: jnp.bfloat16}
# All that gguf.quants decodes.
TYPES = (
    *AS_STORED, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K,
    Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S, Type.IQ4_NL, Type.IQ4_XS,
    Type.TQ1_0, Type.TQ2_0, Type.MXFP4, Type.NVFP4,
)  # fmt: skip
SPECIAL_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class Header:
    """What a GGUF file says before its data: `metadata` {key: value} and `tensors` {name: (type, shape, first byte)}."""

    def __init__(self, path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise storage(error) or InputError(f"{path} cannot be read ({error}): give a GGUF file.") from None
        if self.bytes[:4] != b"GGUF":
            raise InputError(
                f"{path} is not a GGUF file: it starts with {self.bytes[:4]!r}; copy or download it again."
            )
        if len(self.bytes) < 24:
            raise self._damaged(f"it has {len(self.bytes)} bytes")
        reader = gguf_reader.Reader(self.bytes, 4)
        version, tensors, keys = reader.unpack("IQQ")
        if version not in (2, 3):
            raise InputError(
                f"{path}: GGUF version {version} is not supported, only 2 and 3 with the lowest byte first."
            )
        try:
            self.metadata, stored = reader.metadata(keys), reader.tensors(tensors)
        except (struct.error, ValueError, KeyError, OverflowError, MemoryError):
            raise self._damaged(f"its header breaks off at byte {reader.at}") from None
        if self.metadata.get("split.count", 0) not in (0, 1):
            raise InputError(f"{path} is one of several parts: join them first (llama-gguf-split --merge).")
        self.tensors = self._placed(stored, reader.at)

    def _placed(self, stored, end):
        """{name: (type, shape, first byte)}, checked against the types that are read and the file's length."""
        alignment, known, tensors = self.metadata.get("general.alignment", 32), {t.value: t for t in Type}, {}
        if not isinstance(alignment, int) or alignment < 1:
            raise self._damaged(f"general.alignment={alignment!r}")
        data = -(-end // alignment) * alignment
        for name, (shape, number, offset) in stored.items():
            kind = known.get(number)
            if kind not in TYPES:
                raise InputError(
                    f"{self.path}: tensor {name} has the type {kind.name if kind else number}, which is not read: quantise "
                    f"the model to one of {', '.join(t.name for t in TYPES)}."
                )
            block, _ = GGML_QUANT_SIZES[kind]
            if not 1 <= len(shape) <= 2 or 0 in shape or shape[-1] % block or (len(shape) == 1 and block > 1):
                raise self._damaged(f"tensor {name} has shape {shape}")
            tensors[name] = kind, shape, data + offset
            if data + offset + length(kind, shape) > len(self.bytes):
                raise self._damaged(f"tensor {name} ends behind the file's {len(self.bytes)} bytes")
        for name, (kind, shape, start) in sorted(tensors.items(), key=lambda item: item[1][2]):
            if start < data:  # bytes that count twice would make a small file a model of any size
                raise self._damaged(f"tensor {name} begins within another")
            data = start + length(kind, shape)
        return tensors

    def _damaged(self, what):
        return InputError(f"{self.path} is truncated or damaged: {what}; copy or download it again.")

    def architecture(self):
        """general.architecture; InputError for one that is not supported, and for a mixture of experts."""
        name = self.metadata.get("general.architecture")
        if name not in registry.GGUF:
            raise InputError(
                f"{self.path}: general.architecture={name!r} is not supported; known: {', '.join(registry.GGUF)}."
            )
        if self.metadata.get(f"{name}.expert_count", 0):
            raise InputError(f"{self.path}: a mixture of experts ({name}.expert_count) is not supported.")
        return name

    def size(self, key, default=None):
        """The whole number above 0 under {architecture}.`key`; a list of equal numbers, one a layer, counts as one."""
        value = self.metadata.get(f"{self.architecture()}.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{self.path}: {self.architecture()}.{key}={value!r} must be a whole number above 0.")
        return value

    def real(self, key, default=None):
        """The finite number above 0 under {architecture}.`key`, in the fewest digits that give its float32."""
        value = self.metadata.get(f"{self.architecture()}.{key}", default)
        if not isinstance(value, (int, float)) or not 0 < np.float32(value) < np.inf:
            raise InputError(f"{self.path}: {self.architecture()}.{key}={value!r} must be a finite number above 0.")
        return float(str(np.float32(value)))

    def special(self, name):
        """The id of the "bos", "eos", "unk" or "pad" token, or None; InputError where no token has it."""
        tokens = self.metadata.get("tokenizer.ggml.tokens") or []
        if not isinstance(tokens, list):
            raise self._damaged(f"tokenizer.ggml.tokens={tokens!r}")
        sentencepiece = self.metadata.get("tokenizer.ggml.model") == "llama"
        default = {"unk": 0, "bos": 1, "eos": 2}.get(name) if sentencepiece else None
        value = self.metadata.get(f"tokenizer.ggml.{SPECIAL_IDS[name]}_token_id", default)
        if value is not None and not (isinstance(value, int) and 0 <= value < len(tokens)):
            raise self._damaged(f"its {name} token id is {value!r} of {len(tokens)} tokens")
        return value


def length(kind, shape):
    """Bytes of a tensor."""
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size
