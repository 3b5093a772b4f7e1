"""The models that a plan is asked for, by name or by directory: their parameters' shapes, and no weights."""

import contextlib
import dataclasses
import functools
import pathlib
from typing import NamedTuple

import jax

from dplora_jax.errors import InputError
from dplora_jax.files import find, read_json
from dplora_jax.models import pretrained, quantized, registry
from dplora_jax.models.safetensors_file import SafetensorsCheckpoint, weight_files
from experiments.plan.shapes import KNOWN


class NoWeights(NamedTuple):
    """Stands for a checkpoint of which only config.json is known: it is taken to hold all that its model could have, but no
    matrix that the published code shares with another (ChatGLM-6B's output)."""

    directory: pathlib.Path

    def has(self, name):
        """Whether there is such a tensor: a pooler counts."""
        return name != "lm_head.weight"


def build(base, classes, layers=None):
    """The model of `base` (a `config.Base`), whose name is one in KNOWN or a directory with config.json, and the shapes of its
    parameters as it has them (dtype, quantisation, remat) -> (model, params of jax.ShapeDtypeStruct). `classes` None: a language
    model. `layers` is how many layers it has, where not as many as it says.

    Raises InputError on a name that is neither, and where the model is not supported.
    """
    if base.name in KNOWN:
        hf, place = KNOWN[base.name], pathlib.Path(base.name)
    else:
        place = pathlib.Path(base.name).expanduser()
        if not (place / "config.json").is_file():
            raise InputError(
                f"--model={base.name} is neither a directory with config.json nor one of {', '.join(KNOWN)}."
            )
        hf = pretrained.config(place)
    hf = with_layers(hf, layers)
    there = place.is_dir() and bool(weight_files(place))  # then it is looked up which tensors there are
    with SafetensorsCheckpoint(place) if there else contextlib.nullcontext(NoWeights(place)) as checkpoint:
        model = pretrained.build(hf, checkpoint, classes, base.dtype)
    if base.remat:
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=True))
    params = jax.eval_shape(model.init, jax.random.key(0))
    if base.quantize:
        params = jax.eval_shape(functools.partial(quantized.quantize, model=model, kind=base.quantize), params)
    return model, params


def with_layers(hf, layers):
    """config.json `hf` (a dict) with so many layers; as it is, where `layers` is None."""
    return hf if layers is None else hf | {name: layers for name in pretrained.DEPTH if name in hf}


def default_task(name):
    """What a plan trains unless told: the labels of a masked language model, the next tokens of all others."""
    place = pathlib.Path(name).expanduser()
    hf = KNOWN.get(str(name)) or (read_json(place / "config.json") if find(place, "config.json") else {})
    return "classification" if registry.bidirectional(hf.get("model_type")) else "language_model"
