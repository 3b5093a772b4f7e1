"""One GGUF file as a checkpoint: its tensors under Hugging Face names, its metadata as a config.json and as a tokenizer.

Tensor names and metadata keys are as llama.cpp's converter writes them; the blocks are decoded by gguf.quants.
"""

import re

import numpy as np
from gguf import quants

from dplora_jax.errors import InputError
from dplora_jax.models import gguf_tokenizer, registry
from dplora_jax.models.gguf_header import AS_STORED, SPECIAL_IDS, Header, Type, length

ROTARY = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|blk\.\d+\.attn_rot_embd(\.weight)?")
# What would change a logit and is not done here: {key below the architecture's: the values that change none}.
PLAIN_VALUES = {
    "attention.causal": (True,), "attention.scale": (0.0,), "attention.clamp_kqv": (0.0,), "logit_scale": (1.0, 0.0),
    "embedding_scale": (1.0, 0.0), "residual_scale": (1.0, 0.0), "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,), "rope.scaling.attn_factor": (1.0, 0.0),
}  # fmt: skip


class GgufCheckpoint:
    """A GGUF file opened for reading tensor by tensor; the counterpart of a directory of safetensors.

    `directory` is the file's path, for messages. Raises InputError on a damaged file, an architecture that no family has, a
    mixture of experts, a quantisation that is not read and a tensor that has no place in the family.
    """

    def __init__(self, path):
        self.directory = path
        self._header = _family_header(path)
        self._names = registry.GGUF[self._header.architecture()]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._header = None

    def has(self, name):
        """Whether a tensor of that Hugging Face name is there."""
        return stored_name(self._names, name) in self._header.tensors

    def shape(self, name):
        """The shape of the tensor of that Hugging Face name, kernels as [O, I]; InputError where it is missing."""
        return self._find(name)[1]

    def read(self, name, rows=slice(None)):
        """The `rows` of the tensor of that Hugging Face name: float32, or float16 and bfloat16 where it is stored so.

        Only these rows are decoded, so that the caller can bound the memory; any slice gives the same values as that
        slice of the whole. InputError where the tensor is missing.
        """
        kind, shape, start = self._find(name)
        rows_of_bytes = np.frombuffer(self._header.bytes, np.uint8, length(kind, shape), start).reshape(shape[0], -1)
        order = self._order(name, shape[0])
        rows_of_bytes = rows_of_bytes[rows if order is None else order[rows]]
        if kind in AS_STORED:
            value = rows_of_bytes.view(AS_STORED[kind]).reshape(-1, *shape[1:])
        else:
            with np.errstate(all="ignore"):  # the scales of a damaged block may be anything
                value = quants.dequantize(rows_of_bytes, kind)
        norm = self._names.added and name.endswith("norm.weight")
        return value - np.asarray(self._names.added, value.dtype) if norm else value

    def refuse_unread(self, idle=""):
        """Nothing to refuse: a tensor without a place stopped the file when it was opened."""

    def _order(self, name, rows):
        """Where the file keeps each row of the tensor of that Hugging Face name, or None."""
        heads = self._header.size("attention.head_count")
        try:
            return self._names.order(name, rows, heads, self._header.size("attention.head_count_kv", heads))
        except InputError as error:
            raise InputError(f"{self.directory}: {error}") from None

    def _find(self, name):
        if not self.has(name):
            raise InputError(f"{self.directory}: the checkpoint has no tensor {name}.")
        return self._header.tensors[stored_name(self._names, name)]


def _family_header(path):
    """The header of a file whose every tensor has a place in its family and one of its layers."""
    header = Header(path)
    name, layers = header.architecture(), header.size("block_count")
    for tensor in header.tensors:
        if not (ROTARY.fullmatch(tensor) or _placed(registry.GGUF[name], tensor, layers)):
            raise InputError(f"{path}: tensor {tensor} has no place in a {name} model of {layers} layers.")
    return header


def _placed(names, tensor, layers):
    """Whether llama.cpp's name `tensor` stands for a parameter of the family, in one of its layers."""
    layer = re.fullmatch(r"blk\.(\d+)\.(.+)", tensor)
    module, _, part = (layer[2] if layer else tensor).rpartition(".")
    if layer and int(layer[1]) >= layers:
        return False
    known = names.layer_modules if layer else names.modules
    return (part == "weight" and module in known.values()) or (part == "bias" and module in names.biased)


def stored_name(names, name):
    """llama.cpp's name of the tensor of a Hugging Face name; the name itself where it has none."""
    module, _, part = name.rpartition(".")
    layer = re.fullmatch(rf"{re.escape(names.layers)}\.(\d+)\.(.+)", module)
    if layer:
        return f"blk.{layer[1]}.{names.layer_modules.get(layer[2], layer[2])}.{part}"
    return f"{names.modules.get(module, module)}.{part}"


def config(path):
    """The metadata as the dict of a config.json; InputError as of GgufCheckpoint, and where a size is missing."""
    header = _family_header(path)
    name = header.architecture()
    names, heads, width = registry.GGUF[name], header.size("attention.head_count"), header.size("embedding_length")
    head_dim = header.size("attention.key_length", width // heads)
    for key, plain in PLAIN_VALUES.items():
        value = header.metadata.get(f"{name}.{key}", plain[0])
        if value not in plain and key not in names.reads:
            raise InputError(f"{path}: {name}.{key}={value!r} is not supported, only {plain[0]!r}.")
    pattern = f"{name}.attention.sliding_window_pattern"
    if pattern in header.metadata:
        raise InputError(f"{path}: {pattern} is not supported: convert the model from safetensors without it.")
    for key in ("attention.value_length", "rope.dimension_count"):
        if key not in names.reads and header.size(key, head_dim) != head_dim:
            raise InputError(f"{path}: {name}.{key}={header.size(key)} must be the width of a head, {head_dim}.")
    if "token_embd.weight" not in header.tensors:
        raise InputError(f"{path}: the checkpoint has no tensor token_embd.weight.")
    return names.document(
        header,
        {
            "model_type": name,
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
            "rope_scaling": _rope_scaling(header, header.size("rope.dimension_count", head_dim)),
            "tie_word_embeddings": "output.weight" not in header.tensors,
            "attention_bias": "blk.0.attn_q.bias" in header.tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
            "sliding_window": header.metadata.get(f"{name}.attention.sliding_window") or None,
            **{f"{token}_token_id": header.special(token) for token in ("bos", "eos", "pad")},
        },
    )


def _rope_scaling(header, turned):
    """config.json's rope_scaling, None where the rotary angles are plain; `turned` numbers of a head turn."""
    prefix = f"{header.architecture()}.rope.scaling."
    options = {k.removeprefix(prefix): v for k, v in header.metadata.items() if k.startswith(prefix)}
    kind = options.pop("type", "linear")  # llama.cpp's default, which a factor of 1 leaves plain
    factor = options.pop("factor", header.metadata.get(f"{header.architecture()}.rope.scale_linear")) or 1.0
    if any(name.startswith("rope_factors_") for name in header.tensors):
        kind = "longrope"
    scaled = kind not in ("none", "linear") or (kind == "linear" and factor != 1)
    if "rope_freqs.weight" in header.tensors:
        if scaled:
            raise InputError(f"{header.path}: rope_freqs.weight together with {kind} rope scaling is not supported.")
        return {"rope_type": "frequency_factors", "factors": _factors(header, "rope_freqs", turned)}
    if not scaled:
        return None
    length = options.pop("original_context_length", None)
    scaling = {"rope_type": kind} | ({} if length is None else {"original_max_position_embeddings": length})
    if kind == "longrope":
        both = {f"{name}_factor": _factors(header, f"rope_factors_{name}", turned) for name in ("short", "long")}
        return scaling | both | {"attention_factor": options.get("attn_factor") or 1.0}
    if kind == "yarn" and set(options) - {"finetuned", "attn_factor"}:
        raise InputError(f"{header.path}: {prefix}{min(options)} is not supported.")
    return scaling | {"factor": factor}


def _factors(header, name, turned):
    """The divisors of the rotary frequencies in the tensor `name`."""
    expected = (turned // 2,)
    kind, shape, start = header.tensors.get(f"{name}.weight", (None, None, None))
    if (kind, shape) != (Type.F32, expected):
        stored = "missing" if kind is None else f"{kind.name} {shape}"
        raise InputError(f"{header.path}: {name}.weight is {stored}, expected F32 {expected}.")
    return np.frombuffer(header.bytes, np.float32, shape[0], start).tolist()


def tokenizer(path):
    """The tokenizer of the metadata, a transformers.PreTrainedTokenizerFast; torch is not imported.

    It adds BOS and EOS, knows its special tokens and has the chat template as the metadata says. Raises InputError on a
    damaged file and on a kind of tokenizer or pre-tokenizer that is not supported.
    """
    header = Header(path)
    return gguf_tokenizer.build(path, header.metadata, {name: header.special(name) for name in SPECIAL_IDS})
