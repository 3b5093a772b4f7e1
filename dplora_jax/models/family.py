"""What a model family says of itself: its adaptable matrices, its weights' names, the options it refuses."""

import dataclasses
from collections.abc import Callable

from dplora_jax.errors import InputError
from dplora_jax.models.layers import ACTIVATIONS

MOST_SIZE = 2**22  # of one axis of a model
MOST_NUMBER = 1e38  # float32's range, nearly
# What config.json holds under a name, where it holds anything there.
KINDS = {
    "architectures": list, "layer_types": list, "id2label": dict, "quantization_config": dict, "rope_scaling": dict,
    "rope_parameters": dict, "tie_word_embeddings": bool, "attention_bias": bool, "mlp_bias": bool, "add_qkv_bias": bool,
    "scale_attn_weights": bool, "scale_attn_by_inverse_layer_idx": bool, "multi_query_attention": bool, "model_type": str,
    "use_sliding_window": bool, "use_parallel_residual": bool, "norm_bias": bool, "classifier_bias": bool,
}  # fmt: skip
KIND_WORDS = {list: "a list of names", dict: "a set of options", bool: "true or false", str: "a name"}


@dataclasses.dataclass(frozen=True)
class Gguf:
    """How llama.cpp's converter writes one architecture, in its names of tensors: {Hugging Face's module: its own}, of the whole
    model and of a layer below `layers`; `biased` are those of its own that may have a bias.

    `document(header, common) -> dict` is the config.json, made of what all architectures say (`gguf_file.config`) and of the
    metadata `reads`, keys that would else be refused. `order(name, rows, heads, kv_heads)` says where the file keeps each row of
    the tensor that Hugging Face calls `name` [rows] int, or None where it keeps them as they are; `added` is what the converter
    adds to every norm's scale. `adapters_only`: adapters are written for it, and its models are not read.
    """

    modules: dict[str, str]
    layer_modules: dict[str, str]
    layers: str = "model.layers"
    biased: tuple[str, ...] = ()
    document: Callable = lambda header, common: common
    reads: tuple[str, ...] = ()
    order: Callable = lambda name, rows, heads, kv_heads: None
    added: float = 0.0
    adapters_only: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models: `classes` {model_type: transformers' (language model, classifier); None where it is code of its own},
    and `build(hf, checkpoint, num_labels, dtype) -> model` of a config.json.

    `bare` {model_type: transformers' class of an encoder without a head}; `bidirectional`, whether tokens see what follows them;
    `gguf` {architecture: Gguf}, what llama.cpp has of it; `gguf_names` {model_type: architecture}, where it has another name.
    """

    classes: dict[str, tuple[str, str] | None]
    build: Callable
    bare: dict[str, str] = dataclasses.field(default_factory=dict)
    bidirectional: bool = False
    gguf: dict[str, Gguf] = dataclasses.field(default_factory=dict)
    gguf_names: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Target:
    """One adaptable matrix: its kernel's `path` below params["layers"], stacked over layers, (inputs, outputs), the short
    names that select it, and its module in the Hugging Face layout with {} for the layer. Without {}, it stands above all
    layers: its `path` is below params, and its adapter counts as one layer's."""

    path: tuple[str, ...]
    shape: tuple[int, int]
    aliases: tuple[str, ...]
    module: str

    @property
    def layered(self):
        """Whether every layer has such a matrix."""
        return "{}" in self.module


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter and the Hugging Face tensor that holds it; {} in `name` stands for the layer.

    `part` is "kernel" (stored transposed, [O, I]), "conv1d" (a kernel stored [I, O]), "embedding", "scale" or "bias".
    An optional one that lacks stays zero. Layers below `first` have none, and no place in it.
    """

    path: tuple[str, ...]
    name: str
    part: str
    optional: bool = False
    first: int = 0

    @property
    def tensor(self):
        """The tensor's full name."""
        return f"{self.name}.{'bias' if self.part == 'bias' else 'weight'}"


def check_kinds(hf):
    """Raise InputError where a value of config.json `hf` is not of its name's kind."""
    for name, kind in KINDS.items():
        value = hf.get(name)
        names = value if isinstance(value, list) else ()
        if value is not None and not (isinstance(value, kind) and all(isinstance(item, str) for item in names)):
            raise InputError(f"config.json: {name}={value!r} must be {KIND_WORDS[kind]}.")


def refuse_unsupported(hf, allowed):
    """Raise InputError where config.json `hf` sets an option of `allowed` {name: values} to another value."""
    for name, values in allowed.items():
        if hf.get(name, values[0]) not in values:
            raise InputError(
                f"config.json: {name}={hf[name]!r} is not supported, only {' or '.join(map(repr, values))}."
            )


def sizes(hf, *names):
    """The whole numbers above 0 that config.json `hf` gives for `names`; InputError where one is missing or is not such a
    number."""
    for name in names:
        if not isinstance(hf.get(name), int) or isinstance(hf[name], bool) or not 1 <= hf[name] <= MOST_SIZE:
            raise InputError(
                f"config.json: {name}={hf.get(name)!r} must be a whole number above 0, at most {MOST_SIZE}."
            )
    return [hf[name] for name in names]


def given(hf, name):
    """{name: value} where config.json `hf` gives one under `name`; else {}."""
    return {} if hf.get(name) is None else {name: hf[name]}


def number(hf, name, default):
    """The number above 0 that config.json `hf` gives under `name`; InputError where it is another thing."""
    value = hf.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST_NUMBER:
        raise InputError(f"config.json: {name}={value!r} must be a finite number above 0.")
    return value


def activation(hf, name, default):
    """The activation that config.json `hf` gives under `name`; InputError where it is not known."""
    value = hf.get(name) or default
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise InputError(f"config.json: {name}={value!r} is not supported; known: {', '.join(ACTIVATIONS)}.")
    return value
