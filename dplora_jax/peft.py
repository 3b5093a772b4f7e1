"""Adapter files of the PEFT library: `adapter_config.json` and `adapter_model.safetensors`, both ways."""

import functools
import math
import operator
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dplora_jax import lora
from dplora_jax.errors import InputError
from dplora_jax.files import find, read_json, to_json
from dplora_jax.lora import LoraConfig, Pair
from dplora_jax.models.decoder import Decoder
from dplora_jax.peft_config import PeftConfig
from dplora_jax.privacy.chain import replace_durably

PREFIX = "base_model.model."
POOLER = re.escape(PREFIX) + r"(bert\.)?pooler\.dense\.lora_[AB]\.weight"
HEAD_PARTS = {"kernel": "weight", "bias": "bias"}  # ours: PEFT's
CONVERT = (
    "python -c \"import safetensors.torch as s, torch; s.save_file(torch.load('adapter_model.bin', weights_only=True), "
    "'adapter_model.safetensors')\""
)


def save(path, model, adapter, config, base=None):
    """Write `adapter` (every A present: see lora.with_frozen) of LoraConfig `config` into the directory `path`.

    `base` is the base model's name for others to find it by: a hub id, not a path of this machine.
    """
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(value) for name, value in to_state_dict(model, adapter, config).items()}
    depth = model.config.num_layers
    first = depth - (config.last_layers or depth)
    modules = _target_modules(model, adapter.get("layers", {}), first)
    alphas = {t: pair.scale * config.rank for t, pair in adapter.get("layers", {}).items()}
    document = {
        "peft_type": "LORA", "task_type": _task_type(model),
        "base_model_name_or_path": base, "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": 0.0,
        "target_modules": modules,
        # PEFT refuses layer numbers next to a regular expression, which names the layers itself.
        "layers_to_transform": list(range(first, depth)) if first and isinstance(modules, list) else None,
        "modules_to_save": [model.head_module] if "head" in adapter else None,
        "bias": "none", "fan_in_fan_out": getattr(model, "fan_in_fan_out", False), "inference_mode": True,
        "init_lora_weights": True, "use_dora": False, "use_rslora": False,
        "alpha_pattern": {
            _by_its_end(model.targets[t].module): alpha
            for t, alpha in alphas.items()
            if not math.isclose(alpha, config.alpha, rel_tol=1e-12)
        },
    }  # fmt: skip
    replace_durably(path / "adapter_model.safetensors", safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    replace_durably(path / "adapter_config.json", to_json(document, indent=2) + "\n")


def _by_its_end(module):
    """PEFT's pattern for the modules of one kind of matrix, in every layer."""
    return re.escape(module).replace(r"\{\}", r"\d+")


def _task_type(model):
    if model.config.num_labels is not None:
        return "SEQ_CLS"
    return "CAUSAL_LM" if isinstance(model, Decoder) else None


def _target_modules(model, chosen, first):
    """PEFT's list of module suffixes; a regular expression where a suffix would also match a matrix that is not adapted."""
    if not chosen:
        return "dummy-target-modules"  # PEFT's own word for an adapter without matrices: it refuses an empty list
    names = {target: model.targets[target].module.split("{}.")[-1] for target in model.targets}
    suffixes = [names[target].split(".")[-1] if names[target].endswith(target) else names[target] for target in chosen]
    greedy = any(f".{names[t]}".endswith(f".{s}") for t in model.targets if t not in chosen for s in suffixes)
    above = any(not model.targets[target].layered for target in chosen)  # PEFT's layer numbers leave out what has none
    if not greedy and not (first and above):
        return suffixes
    layers = f"({'|'.join(map(str, range(first, model.config.num_layers)))})"
    return "|".join(model.targets[t].module.replace(".", r"\.").replace("{}", layers) for t in chosen)


def to_state_dict(model, tree, config):
    """Any tree shaped like an adapter (a gradient, say) under PEFT's names: {name: numpy array}; a frozen A is left out."""
    first = model.config.num_layers - (config.last_layers or model.config.num_layers)
    out = {}
    for target, pair in tree.get("layers", {}).items():
        for letter, stacked in (("A", pair.a), ("B", pair.b)):
            for index, matrix in enumerate(() if stacked is None else np.asarray(stacked)):
                out[f"{PREFIX}{model.targets[target].module.format(first + index)}.lora_{letter}.weight"] = matrix
    for path, name in _head_names(model, tree.get("head", {})).items():
        value = np.asarray(functools.reduce(operator.getitem, path, tree["head"]))
        out[name] = value.T if path[-1] == "kernel" else value
    return out


def _head_names(model, head):
    """PEFT's name of each array of a head by its path; with a dense layer of its own, the part above that has another name."""
    module = model.head_output if "dense" in head else model.head_name
    modules = {(): module} | ({("dense",): model.head_dense} if "dense" in head else {})
    return {
        (*path, part): f"{PREFIX}{name}.{HEAD_PARTS[part]}"
        for path, name in modules.items()
        for part in HEAD_PARTS
        if path or part in head
    }


def load(path, model, params):
    """An adapter directory -> (adapter, LoraConfig), float32. A head that the file lacks is the base's own.

    Matrices of several ranks are filled up to the largest, and layers that the file leaves out above its first as well, as a
    fresh adapter begins: A drawn, B zero, which adds nothing. Raises InputError where a file is missing or damaged, does not fit
    the model, or uses what is not implemented.
    """
    path = pathlib.Path(path)
    document, file = read_json(_file(path, "adapter_config.json")), _file(path, "adapter_model.safetensors")
    try:
        tensors = safetensors.numpy.load_file(file)
    except (
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        safetensors.SafetensorError,
    ) as error:  # a type that numpy lacks
        raise InputError(f"{path} holds no readable PEFT adapter ({error}).") from None
    described = PeftConfig(path, document, (model.head_module, model.head_dense, "classifier", "score"))
    matrices = _matrices(path, model, tensors, described)
    layers, config = _stacked(model, params, matrices, described)
    adapter = {"layers": layers} if layers else {}
    if "head" in params:
        adapter["head"] = _head(path, model, params, tensors)
    if tensors:
        raise InputError(f"{path}: tensor {min(tensors)} has no place in this model.")
    return adapter, config


def _file(path, name):
    """The file `name` of an adapter's directory."""
    file = find(path, name)
    if file is None:
        pickled = name.endswith(".safetensors") and find(path, "adapter_model.bin") is not None
        hint = f"; adapter_model.bin is a pickle, which is not read: convert it there with {CONVERT}" if pickled else ""
        raise InputError(f"{path} holds no readable PEFT adapter (it has no {name}{hint}).")
    return file


def _head(path, model, params, tensors):
    """Take the head out of `tensors`; the base's own where the file has none. PEFT trains one whole, with the dense layer below
    its outputs: it is there where it is not the base's."""
    whole = model.head_dense is not None and f"{PREFIX}{model.head_dense}.weight" in tensors
    shapes, width = {part: value.shape for part, value in params["head"].items()}, params["head"]["kernel"].shape[0]
    if whole:
        shapes["dense"] = {"kernel": (width, width), "bias": (width,)}
    names = _head_names(model, shapes)
    present = [name for name in names.values() if name in tensors]
    if not present:
        return {part: jnp.asarray(value, jnp.float32) for part, value in params["head"].items()}
    if len(present) < len(names):
        raise InputError(f"{path}: the adapter's head has only {present[0]} of {' and '.join(names.values())}.")
    head = {}
    for (*above, part), name in names.items():
        value = tensors.pop(name)
        place, shape = (head.setdefault("dense", {}), shapes["dense"][part]) if above else (head, shapes[part])
        place[part] = jnp.asarray(value.T if part == "kernel" else value, jnp.float32)
        if place[part].shape != shape:
            raise InputError(f"{path}: the adapter's head has another number of labels than the model.")
    own = params.get(lora.HEAD_DENSE)
    if whole and own is not None and all(np.array_equal(head["dense"][part], own[part]) for part in own):
        del head["dense"]
    return head


def _matrices(path, model, tensors, described):
    """Take the A and B matrices out of `tensors` -> {target: {layer: (A, B, scale)}}, each checked against `described`."""
    matrices = {}
    for target, place in model.targets.items():
        for layer in range(model.config.num_layers if place.layered else 1):
            # An adapter of the bare model (FEATURE_EXTRACTION, LlamaModel) lacks the first part of every name.
            full = place.module.format(layer)
            for module in (full, full.split(".", 1)[1]):
                names = [f"{PREFIX}{module}.lora_{letter}.weight" for letter in "AB"]
                pair = [tensors.pop(name) for name in names if name in tensors]
                if pair:
                    matrices.setdefault(target, {})[layer] = _checked(path, target, place, module, pair, described)
    if not any(target == "pooler" for target in model.targets):  # no logit of such a model depends on it
        for name in [name for name in tensors if re.fullmatch(POOLER, name)]:
            del tensors[name]
    return matrices


def _checked(path, target, place, module, pair, described):
    """The (A, B, scale) of one module."""
    if len(pair) < 2:
        raise InputError(f"{path}: the matrices of {target} are incomplete: {module} has only one of A and B.")
    if not described.adapts(module):
        raise InputError(
            f"{path}: there are matrices of {module}, which target_modules, exclude_modules or layers_to_transform of "
            "adapter_config.json leave out, so that PEFT would not use them."
        )
    (inputs, outputs), (rank, scale), (a, b) = place.shape, described.module_scaling(module), pair
    if a.shape != (rank, inputs) or b.shape != (outputs, rank):
        raise InputError(
            f"{path}: {target} has A {a.shape} and B {b.shape}, which do not fit rank {rank} and {place.shape}."
        )
    return a.astype(np.float32), b.astype(np.float32), scale


def _stacked(model, params, matrices, described):
    """({target: Pair}, LoraConfig) of the matrices that `_matrices` found."""
    rank = max((a.shape[0] for by_layer in matrices.values() for a, _, _ in by_layer.values()), default=described.rank)
    alpha = described.alpha
    if described.stabilised or rank != described.rank:
        alpha = described.scale(alpha, described.rank) * rank
    depth = model.config.num_layers
    first = min(
        (layer for target, by_layer in matrices.items() if model.targets[target].layered for layer in by_layer),
        default=0,
    )
    config = LoraConfig(rank, alpha, tuple(sorted(matrices)), depth - first if first else None)
    if not matrices:
        return {}, config
    bare = {name: value for name, value in params.items() if name != "head"}
    layers = lora.init(jax.random.key(0), model, bare, config)["layers"]
    for target, by_layer in matrices.items():
        scales = [scale for _, _, scale in by_layer.values()]
        scale = alpha / rank if any(math.isclose(s, alpha / rank, rel_tol=1e-12) for s in scales) else scales[0]
        a, b = np.array(layers[target].a), np.array(layers[target].b)
        for layer, (layer_a, layer_b, layer_scale) in by_layer.items():
            at, width = layer - first if model.targets[target].layered else 0, len(layer_a)
            a[at, :width] = layer_a
            # Layers of one kind share a scale; where the file gives one another, the ratio goes into its B.
            same = math.isclose(layer_scale, scale, rel_tol=1e-12)
            b[at, :, :width] = layer_b if same else layer_b * np.float32(layer_scale / scale)
        layers[target] = Pair(jnp.asarray(a), jnp.asarray(b), scale)
    return layers, config
