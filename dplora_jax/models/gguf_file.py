"""One GGUF file as a checkpoint: its tensors under Hugging Face names, its metadata as a config.json and as a tokenizer.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; tensor names and metadata keys as llama.cpp's
converter writes them. The header is parsed by `gguf_reader`, not by gguf.GGUFReader, which keeps an array object for each
token and merge (seconds and hundreds of megabytes on a large vocabulary); the blocks are decoded by gguf.quants.
"""

import math
import mmap
import re
import struct

import jax.numpy as jnp
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from dplora_jax.errors import InputError
from dplora_jax.models import gguf_reader, gguf_tokenizer

ARCHITECTURES = ("llama", "qwen2")
AS_STORED = {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: jnp.bfloat16}
TYPES = (*AS_STORED, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q4_K, Type.Q6_K)

MODULES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_MODULES = {
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    **{"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
}
PLACED = re.compile(
    rf"({'|'.join(MODULES.values())}|blk\.(\d+)\.({'|'.join(LAYER_MODULES.values())}))\.weight|"
    r"blk\.(\d+)\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.bias"
)
ROTARY = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|blk\.\d+\.attn_rot_embd(\.weight)?")
SPECIAL_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class _Header:
    """What a GGUF file says before its data: `metadata` {key: value} and `tensors` {name: (type, shape, first byte)}."""

    def __init__(self, path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}): give a GGUF file.") from None
        if self.bytes[:4] != b"GGUF":
            raise InputError(f"{path} is no GGUF file: it starts with {self.bytes[:4]!r}; copy or download it again.")
        if len(self.bytes) < 24:
            raise self._damaged(f"it has {len(self.bytes)} bytes")
        reader = gguf_reader.Reader(self.bytes, 4)
        version, tensors, keys = reader.unpack("IQQ")
        if version not in (2, 3):
            raise InputError(f"{path}: GGUF version {version} is not read, only 2 and 3 with the lowest byte first.")
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
            if data + offset + _length(kind, shape) > len(self.bytes):
                raise self._damaged(f"tensor {name} ends behind the file's {len(self.bytes)} bytes")
        for name, (kind, shape, start) in sorted(tensors.items(), key=lambda item: item[1][2]):
            if start < data:  # bytes that count twice would make a small file a model of any size
                raise self._damaged(f"tensor {name} begins within another")
            data = start + _length(kind, shape)
        return tensors

    def _damaged(self, what):
        return InputError(f"{self.path} is truncated or damaged: {what}; copy or download it again.")

    def architecture(self):
        """general.architecture; InputError for one that is not supported, and for a mixture of experts."""
        name = self.metadata.get("general.architecture")
        if name not in ARCHITECTURES:
            raise InputError(
                f"{self.path}: general.architecture={name!r} is not supported; known: {', '.join(ARCHITECTURES)}."
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


def _length(kind, shape):
    """Bytes of a tensor."""
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


class GgufCheckpoint:
    """A GGUF file opened for reading tensor by tensor; the counterpart of a directory of safetensors.

    `directory` is the file's path, for messages. Raises InputError on a damaged file, another architecture than llama
    and qwen2, a mixture of experts, a quantisation that is not read and a tensor that has no place in these families.
    """

    def __init__(self, path):
        self.directory = path
        self._header = _family_header(path)
        self._permuted = self._header.architecture() == "llama"
        self._heads = {"q": self._header.size("attention.head_count")}
        self._heads["k"] = self._header.size("attention.head_count_kv", self._heads["q"])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._header = None

    def has(self, name):
        """Whether a tensor of that Hugging Face name is there."""
        return _stored_name(name) in self._header.tensors

    def shape(self, name):
        """The shape of the tensor of that Hugging Face name, kernels as [O, I]; InputError where it is missing."""
        return self._find(name)[1]

    def read(self, name, rows=slice(None)):
        """The `rows` of the tensor of that Hugging Face name: float32, or float16 and bfloat16 where it is stored so.

        Only these rows are decoded, so that the caller can bound the memory; any slice gives the same values as that
        slice of the whole. InputError where the tensor is missing.
        """
        kind, shape, start = self._find(name)
        rows_of_bytes = np.frombuffer(self._header.bytes, np.uint8, _length(kind, shape), start).reshape(shape[0], -1)
        projection = re.fullmatch(r".*\.self_attn\.([qk])_proj\.\w+", name)
        if self._permuted and projection:
            heads = self._heads[projection[1]]
            if shape[0] % (2 * heads):
                raise InputError(f"{self.directory}: {name} of shape {shape} is not {heads} heads of an even width.")
            rows = _interleaved(np.arange(shape[0])[rows], shape[0] // heads)
        rows_of_bytes = rows_of_bytes[rows]
        if kind in AS_STORED:
            return rows_of_bytes.view(AS_STORED[kind]).reshape(-1, *shape[1:])
        with np.errstate(all="ignore"):  # the scales of a damaged block may be anything
            return quants.dequantize(rows_of_bytes, kind)

    def refuse_unread(self):
        """Nothing to refuse: a tensor without a place stopped the file when it was opened."""

    def _find(self, name):
        if not self.has(name):
            raise InputError(f"{self.directory}: the checkpoint has no tensor {name}.")
        return self._header.tensors[_stored_name(name)]


def _family_header(path):
    """The header of a file whose every tensor has a place in its family and one of its layers."""
    header = _Header(path)
    name, layers = header.architecture(), header.size("block_count")
    for tensor in header.tensors:
        placed = PLACED.fullmatch(tensor)
        if not (placed or ROTARY.fullmatch(tensor)) or (placed and int(placed[2] or placed[4] or 0) >= layers):
            raise InputError(f"{path}: tensor {tensor} has no place in a {name} model of {layers} layers.")
    return header


def _stored_name(name):
    """llama.cpp's name of the tensor of a Hugging Face name; the name itself where it has none."""
    module, _, part = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if layer:
        return f"blk.{layer[1]}.{LAYER_MODULES.get(layer[2], layer[2])}.{part}"
    return f"{MODULES.get(module, module)}.{part}"


def _interleaved(rows, width):
    """Where llama.cpp keeps rows of q and k: it pairs neighbours (2i, 2i+1) of a head of `width`, the Hugging Face layout
    pairs the halves (i, i + width/2); the converter reorders the rows from one to the other."""
    head, inside = np.divmod(rows, width)
    half, pair = np.divmod(inside, width // 2)
    return head * width + 2 * pair + half


def config(path):
    """The metadata as the dict of a config.json; InputError as of GgufCheckpoint, and where a size is missing."""
    header = _family_header(path)
    name = header.architecture()
    heads, width = header.size("attention.head_count"), header.size("embedding_length")
    head_dim = header.size("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if header.size(key, head_dim) != head_dim:
            raise InputError(f"{path}: {name}.{key}={header.size(key)} must be the width of a head, {head_dim}.")
    if "token_embd.weight" not in header.tensors:
        raise InputError(f"{path}: the checkpoint has no tensor token_embd.weight.")
    window = header.metadata.get(f"{name}.attention.sliding_window") or None
    return {
        "model_type": "mistral" if name == "llama" and window else name,  # llama.cpp has one name for both
        "vocab_size": header.tensors["token_embd.weight"][1][0],
        "hidden_size": width,
        "intermediate_size": header.size("feed_forward_length"),
        "num_hidden_layers": header.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": header.real("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": header.size("context_length"),
        "rope_theta": header.real("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(header, head_dim),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
        "sliding_window": window,
        **{f"{token}_token_id": header.special(token) for token in ("bos", "eos", "pad")},
    }


def _rope_scaling(header, head_dim):
    """config.json's rope_scaling, None where the rotary angles are plain."""
    prefix = f"{header.architecture()}.rope.scaling."
    options = {k.removeprefix(prefix): v for k, v in header.metadata.items() if k.startswith(prefix)}
    kind = options.pop("type", "linear")  # llama.cpp's default, which a factor of 1 leaves plain
    factor = options.pop("factor", header.metadata.get(f"{header.architecture()}.rope.scale_linear")) or 1.0
    if any(name.startswith("rope_factors_") for name in header.tensors):
        kind = "longrope"
    scaled = kind not in ("none", "linear") or (kind == "linear" and factor != 1)
    if "rope_freqs.weight" not in header.tensors:
        alone = {} if kind == "linear" else options
        return {"rope_type": kind, "factor": factor} | alone if scaled else None
    if scaled:
        raise InputError(f"{header.path}: rope_freqs.weight together with {kind} rope scaling is not supported.")
    kind, shape, start = header.tensors["rope_freqs.weight"]
    if (kind, shape) != (Type.F32, (head_dim // 2,)):
        raise InputError(f"{header.path}: rope_freqs.weight is {kind.name} {shape}, expected F32 {(head_dim // 2,)}.")
    factors = np.frombuffer(header.bytes, np.float32, shape[0], start).tolist()
    return {"rope_type": "frequency_factors", "factors": factors}


def tokenizer(path):
    """The tokenizer of the metadata, a transformers.PreTrainedTokenizerFast; torch is not imported.

    It adds BOS and EOS, knows its special tokens and has the chat template as the metadata says. Raises InputError on a
    damaged file and on a kind of tokenizer or pre-tokenizer that is not supported.
    """
    header = _Header(path)
    return gguf_tokenizer.build(path, header.metadata, {name: header.special(name) for name in SPECIAL_IDS})
