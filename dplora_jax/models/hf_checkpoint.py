"""A model's parameters as the files that transformers, or sentence-transformers, reads: what `pretrained` reads, written.

Letters: I inputs, O outputs of a kernel.
"""

import math
import re
import shutil
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dplora_jax.errors import InputError
from dplora_jax.files import find, is_plain, read_bytes, read_json, to_json
from dplora_jax.models import quantized, registry, rope, tokenizer_files
from dplora_jax.models.decoder import Decoder
from dplora_jax.models.family import sizes
from dplora_jax.models.safetensors_file import SafetensorsCheckpoint

SHARD_BYTES = 5 * 10**9  # of one safetensors file, at most, unless a single tensor is larger
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# What a tokenizer, generation and a licence lie in, beside the weights; code only where the config names it.
SIDE_FILES = (
    *tokenizer_files.NAMES, "generation_config.json",
    *(f"{name}{ending}" for name in ("LICENSE", "NOTICE") for ending in ("", ".txt", ".md")),
)  # fmt: skip
RELATIVE_IMPORT = re.compile(r"^\s*(?:import|from)\s+\.(\w+)", re.MULTILINE)
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Tensor(NamedTuple):
    """A tensor to write, which `read` () makes when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def averages(model):
    """Whether `model` is a classifier on the mean of its tokens, which no class of transformers is."""
    return model.config.num_labels is not None and getattr(model.config, "pooling", None) == "mean"


def class_name(model, hf):
    """The class that reads the export: transformers', of the config.json `hf`, or what the model's own code calls it; the bare
    encoder below a mean."""
    family = registry.FAMILIES[hf["model_type"]]
    if averages(model):
        return family.bare[hf["model_type"]]
    classes = family.classes[hf["model_type"]]
    if classes is None:
        return (hf.get("architectures") or ["ChatGLMForConditionalGeneration"])[0]
    return classes[model.config.num_labels is not None]


def config(model, hf, labels=None, pad_token_id=None):
    """The config.json to write, from the source's `hf`: its class, dtype and, of a classifier, its labels' names.

    A decoder's classifier also needs `pad_token_id`: transformers takes a row's last token that is not this one. Raises
    InputError where that lacks, and on rotary frequencies of a GGUF file that transformers has no name for.
    """
    out = {name: value for name, value in hf.items() if name not in ("torch_dtype", "num_labels")}
    out |= {"architectures": [class_name(model, hf)], "dtype": str(model.param_dtype or model.dtype)}
    scaling = hf.get("rope_scaling") or {}
    if scaling.get("rope_type") == "frequency_factors":
        out["rope_scaling"] = LLAMA3_ROPE | {"rope_type": "llama3", "factor": max(scaling["factors"])}
        known = rope.read(out, model.config.head_width).frequencies
        if not np.allclose(known, model.config.rope.frequencies, rtol=1e-5, atol=0):
            raise InputError("the GGUF file's rope_freqs.weight is not Llama 3's scaling, the only one with a name.")
    if model.config.num_labels is None:
        return out
    labels = labels or tuple(f"LABEL_{i}" for i in range(model.config.num_labels))
    out |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    out["problem_type"] = "single_label_classification"
    if isinstance(model, Decoder):
        if pad_token_id is None:
            raise InputError("the tokenizer has no pad token, by which transformers finds a row's last token.")
        out["pad_token_id"] = pad_token_id
    return out


def save(directory, model, params, document, source=None, shard_bytes=SHARD_BYTES):
    """Write `params` (no adapter) and config.json `document` into `directory`; a mean-pooled classifier without its head, for
    `save_modules` to write.

    Each tensor is copied when it is written, so the host holds the parameters and one tensor. `source` is the base's
    directory. Raises InputError on a base in few bits: neither library reads these codes, and an adapter merged into them
    is rounded away.
    """
    if any(map(quantized.is_quantized, jax.tree.leaves(params, is_leaf=quantized.is_quantized))):
        raise InputError(
            "a base in int8 or nf4 cannot be exported: merge the adapter into the base read without quantize."
        )
    table = list(tensors(model, params))
    if averages(model):
        prefix = f"{model.base}."
        table = [t._replace(name=t.name.removeprefix(prefix)) for t in table if t.name.startswith(prefix)]
    if source is None or source.is_file():
        write(directory, table, shard_bytes)
    else:
        with SafetensorsCheckpoint(source) as checkpoint:
            write(directory, [*table, *_carried(model, checkpoint)], shard_bytes)
    _write_json(directory / "config.json", document)


def tensors(model, params):
    """Each tensor of `params` under its Hugging Face name, layer by layer: kernels turned back to [O, I], conv1d as they are."""
    for weight in model.weights():
        leaf = params
        for key in weight.path:
            leaf = leaf[key]
        layered = "{}" in weight.name
        shape = leaf.shape[1:] if layered else leaf.shape
        turned = weight.part == "kernel"

        def read(layer=None, leaf=leaf, turned=turned):
            value = np.asarray(leaf if layer is None else leaf[layer])
            return value.T if turned else value

        for layer in range(leaf.shape[0]) if layered else (None,):
            yield Tensor(
                weight.tensor.format(weight.first + (layer or 0)), shape[::-1] if turned else shape, np.dtype(leaf.dtype),
                lambda read=read, layer=layer: read(layer),
            )  # fmt: skip


def _carried(model, checkpoint):
    """The source's tensors that the class of the export has and the model does not read."""
    names = model.carried if averages(model) or isinstance(model, Decoder) else ()
    names = [name.format(i) for name in names for i in range(model.config.num_layers if "{}" in name else 1)]
    for name in filter(checkpoint.has, names):
        value = checkpoint.read(name)
        yield Tensor(
            name.removeprefix(f"{model.base}.") if averages(model) else name, value.shape, value.dtype,
            lambda value=value: value,
        )  # fmt: skip


def write(directory, table, shard_bytes=SHARD_BYTES):
    """Write Tensors as `model.safetensors`, or as shards of at most `shard_bytes` and their index."""
    shards = [[]]
    for tensor in table:
        if shards[-1] and sum(map(_nbytes, shards[-1])) + _nbytes(tensor) > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return _write_file(directory / "model.safetensors", table)
    placed = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(directory / name, shard)
        placed.update({tensor.name: name for tensor in shard})
    index = {"metadata": {"total_size": sum(map(_nbytes, table))}, "weight_map": placed}
    _write_json(directory / "model.safetensors.index.json", index)


def _nbytes(tensor):
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _write_file(path, table):
    """One safetensors file, whose library would want every tensor in memory at once: its header, then each tensor's bytes."""
    table = sorted(
        table, key=lambda tensor: -tensor.dtype.itemsize
    )  # so that every tensor starts at a multiple of its items
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for tensor in table:
        end = start + _nbytes(tensor)
        header[tensor.name] = {"dtype": DTYPES[str(tensor.dtype)], "shape": tensor.shape, "data_offsets": (start, end)}
        start = end
    text = to_json(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in table:
            file.write(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data)


def _write_json(path, document):
    path.parent.mkdir(exist_ok=True)
    path.write_text(to_json(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_modules(directory, model, params, labels, source=None, max_length=None):
    """Write what makes sentence-transformers serve a mean-pooled classifier: its `encode` gives the logits [B, num_labels].

    The head is a Dense module with no activation; `labels` are its outputs' names. Texts are cut to `max_length` tokens, by
    default as the source says. The spellings are the oldest that sentence-transformers still reads (2.3 and later).
    """
    c, modules = model.config, [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules += [("2_Normalize", "Normalize")] if c.normalize else []
    modules += [(f"{len(modules)}_Dense", "Dense")]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    _write_json(directory / "modules.json", listed)
    settings_name = "sentence_bert_config.json"
    settings = read_json(source / settings_name) if source is not None and find(source, settings_name) else {}
    if not max_length and settings.get("max_seq_length"):
        (max_length,) = sizes(settings, "max_seq_length")
    length = min(max_length or c.max_positions, c.max_positions)
    _write_json(
        directory / settings_name, {"max_seq_length": length, "do_lower_case": settings.get("do_lower_case") is True}
    )
    pooling = {"word_embedding_dimension": c.width, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    pooling |= {"pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False}
    _write_json(directory / "1_Pooling" / "config.json", pooling)
    dense = directory / modules[-1][0]
    linear = {"in_features": c.width, "out_features": c.num_labels, "bias": True}
    _write_json(dense / "config.json", linear | {"activation_function": "torch.nn.modules.linear.Identity"})
    head = [t for t in tensors(model, params) if t.name.startswith(f"{model.head_name}.")]
    _write_file(dense / "model.safetensors", [t._replace(name=f"linear.{t.name.split('.')[-1]}") for t in head])
    _write_json(directory / "config_sentence_transformers.json", {"prompts": {}, "labels": list(labels)})


def copy_side_files(source, directory, tokenizer: Any = None, with_code=False):
    """Copy the tokenizer, the generation settings and the licence from the base's directory, each a file known by its name: what
    else lies there is nobody's to publish. From a GGUF file, save `tokenizer`.

    A `tokenizer` whose pad token the source's tokenizer_config.json does not name has it written there. `with_code` copies the
    Python files that config.json names too.
    """
    if source.is_file():
        tokenizer.save_pretrained(directory)
        return
    for name in (*SIDE_FILES, *(_own_code(source) if with_code else ())):
        path = find(source, name)
        if path is not None:
            shutil.copyfile(path, directory / name)
    path = directory / "tokenizer_config.json"
    if tokenizer is not None and path.exists() and not (document := read_json(path)).get("pad_token"):
        _write_json(path, document | {"pad_token": tokenizer.pad_token})


def _own_code(source):
    """The Python files of the classes that config.json and tokenizer_config.json name, and those that these import from there."""
    settings = [read_json(source / name) for name in ("config.json", "tokenizer_config.json") if find(source, name)]
    maps = [part["auto_map"] for part in settings if isinstance(part.get("auto_map"), dict)]
    classes = [
        name for named in maps for value in named.values() for name in (value if isinstance(value, list) else [value])
    ]
    wanted, code_files = [str(name).split(".")[0] for name in classes if name], {}
    while wanted:
        name = f"{wanted.pop()}.py"
        if name not in code_files and is_plain(name) and (path := find(source, name)):
            code_files[name] = path
            wanted += RELATIVE_IMPORT.findall(read_bytes(path).decode("utf-8", "replace"))
    return tuple(code_files)
