"""Adapter files of the PEFT library: `adapter_config.json` and `adapter_model.safetensors`, both ways."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from dplora_jax.errors import InputError
from dplora_jax.files import to_json
from dplora_jax.lora import LoraConfig, Pair
from dplora_jax.models.decoder import Decoder
from dplora_jax.privacy.chain import replace_durably

PREFIX = "base_model.model."
HEAD_PARTS = {"kernel": "weight", "bias": "bias"}  # ours: PEFT's
# What PEFT can do and this program does not: {option: the values that mean "not used"}.
UNUSED = {
    "use_dora": (False, None), "use_rslora": (False, None), "bias": ("none",), "lora_bias": (False, None),
    "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "layer_replication": (None,), "use_qalora": (False, None),
    "use_bdlora": (None, False), "trainable_token_indices": (None,), "alora_invocation_tokens": (None,),
    "target_parameters": (None, []), "loftq_config": ({}, None),
    # How A and B began is of no concern, unless the base's own matrices were changed to make room (PiSSA, OLoRA, ...).
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}  # fmt: skip


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
    document = {
        "peft_type": "LORA", "task_type": _task_type(model),
        "base_model_name_or_path": base, "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": 0.0,
        "target_modules": modules,
        # PEFT refuses layer numbers next to a regular expression, which names the layers itself.
        "layers_to_transform": list(range(first, depth)) if first and isinstance(modules, list) else None,
        "modules_to_save": [model.head_name] if "head" in adapter else None,
        "bias": "none", "fan_in_fan_out": getattr(model, "fan_in_fan_out", False), "inference_mode": True,
        "init_lora_weights": True, "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    replace_durably(path / "adapter_model.safetensors", safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    replace_durably(path / "adapter_config.json", to_json(document, indent=2) + "\n")


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
    if not greedy:
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
    if "head" in tree:
        for part, value in tree["head"].items():
            value = np.asarray(value)
            out[f"{PREFIX}{model.head_name}.{HEAD_PARTS[part]}"] = value.T if part == "kernel" else value
    return out


def load(path, model, params):
    """An adapter directory -> (adapter, LoraConfig), float32. A head that the file lacks is the base's own.

    Raises InputError where a file is missing or damaged, does not fit the model, or uses what is not implemented.
    """
    path = pathlib.Path(path)
    try:
        document = json.loads((path / "adapter_config.json").read_text())
        tensors = safetensors.numpy.load_file(path / "adapter_model.safetensors")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} holds no readable PEFT adapter ({error}).") from None
    peft_type = document.get("peft_type") if isinstance(document, dict) else None
    if peft_type != "LORA":
        raise InputError(f"{path}: peft_type={peft_type!r} is not supported, only 'LORA'.")
    for option, unused in UNUSED.items():
        if document.get(option, unused[0]) not in unused:
            raise InputError(f"{path}: the adapter uses {option}={document[option]!r}, which is not supported.")
    # PEFT lists both of its usual names of a head for every classifier; which one it is, the tensors tell.
    strange = set(document.get("modules_to_save") or ()) - {getattr(model, "head_name", None), "classifier", "score"}
    if strange:
        raise InputError(f"{path}: modules_to_save={sorted(strange)} is not supported, only the head.")
    rank, alpha = document.get("r"), document.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise InputError(f"{path}: adapter_config.json has r={rank!r} and lora_alpha={alpha!r}, which make no adapter.")
    layers, last_layers = _layers(path, model, tensors, rank, alpha / rank)
    adapter = {"layers": layers} if layers else {}
    if "head" in params:
        adapter["head"] = _head(path, model, params["head"], tensors)
    if tensors:
        raise InputError(f"{path}: tensor {min(tensors)} has no place in this model.")
    return adapter, LoraConfig(rank, alpha, tuple(sorted(layers)), last_layers)


def _head(path, model, own, tensors):
    """Take the head out of `tensors`; the base's `own` where the file has none."""
    names = {part: f"{PREFIX}{model.head_name}.{HEAD_PARTS[part]}" for part in own}
    found = [name for name in names.values() if name in tensors]
    if not found:
        return {part: jnp.asarray(value, jnp.float32) for part, value in own.items()}
    if len(found) < len(own):
        raise InputError(f"{path}: the adapter's head has only {found[0]} of {' and '.join(names.values())}.")
    head = {part: tensors.pop(name) for part, name in names.items()}
    head["kernel"] = head["kernel"].T
    if any(head[part].shape != own[part].shape for part in own):
        raise InputError(f"{path}: the adapter's head has another number of labels than the model.")
    return {part: jnp.asarray(value, jnp.float32) for part, value in head.items()}


def _layers(path, model, tensors, rank, scale):
    """Take the A and B matrices out of `tensors` -> ({target: Pair}, last_layers)."""
    layers, last_layers, depth = {}, None, model.config.num_layers
    for target, place in model.targets.items():
        names = {i: f"{PREFIX}{place.module.format(i)}.lora_{{}}.weight" for i in range(depth)}
        present = [i for i, name in names.items() if name.format("A") in tensors or name.format("B") in tensors]
        if not present:
            continue
        if present != list(range(depth - len(present), depth)) or (layers and len(present) != (last_layers or depth)):
            raise InputError(
                f"{path}: {target} is adapted on layers {present}; only the same last layers of every target are supported."
            )
        last_layers = None if len(present) == depth else len(present)
        try:
            a, b = (
                np.stack([tensors.pop(names[i].format(letter)) for i in present]).astype(np.float32) for letter in "AB"
            )
        except (KeyError, ValueError):
            raise InputError(
                f"{path}: the matrices of {target} are incomplete or differ in shape from layer to layer."
            ) from None
        inputs, outputs = place.shape
        if a.shape[1:] != (rank, inputs) or b.shape[1:] != (outputs, rank):
            raise InputError(
                f"{path}: {target} has A {a.shape[1:]} and B {b.shape[1:]}, which do not fit rank {rank} and {place.shape}."
            )
        layers[target] = Pair(jnp.asarray(a), jnp.asarray(b), scale)
    return layers, last_layers
