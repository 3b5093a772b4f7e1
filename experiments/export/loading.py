"""The base and the adapter of an export, as its files say them."""

import pathlib
import re
import warnings
from typing import Any, NamedTuple

from dplora_jax import files
from dplora_jax.errors import InputError


class Loaded(NamedTuple):
    """A base (where it lies, its config.json, model and parameters), a classifier's label names, and the adapter with its
    LoraConfig."""

    place: pathlib.Path
    hf: dict
    model: Any
    params: dict
    labels: tuple | None
    adapter: dict
    config: Any


def load(job):
    """The Loaded of an export.Job; InputError where base, adapter and labels do not fit each other."""
    from dplora_jax import peft
    from dplora_jax.models import pretrained

    place = pretrained.locate(job.model)
    if job.out.resolve() == place.resolve():
        raise InputError(f"--out={job.out} is the base model's own directory: choose another.")
    hf = pretrained.config(place)
    model, params = _base(place, job)
    labels = _labels(job, model, hf)
    return Loaded(place, hf, model, params, labels, *peft.load(job.adapter, model, params))


def _base(place, job):
    """The base (model, params); where the adapter has a head, a classifier of as many labels, whose own head does not matter."""
    from dplora_jax import models

    count = head_rows(job.adapter)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the head starts fresh")
        return models.from_pretrained(place, job.dtype, label_names=None if count is None else range(count))


def head_rows(adapter):
    """How many labels the classification head in an adapter's file has; None where it has no head."""
    import safetensors

    path = files.find(adapter, "adapter_model.safetensors")
    if path is None:
        raise InputError(f"{adapter} holds no readable PEFT adapter (it has no adapter_model.safetensors).")
    try:
        with safetensors.safe_open(path, "np") as file:
            pattern = r"\.(classifier|classifier\.out_proj|score)\.weight$"
            heads = [name for name in file.keys() if re.search(pattern, name)]  # noqa: SIM118
            shape = file.get_slice(heads[0]).get_shape() if heads else None
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{adapter} holds no readable PEFT adapter ({error}).") from None
    if shape is not None and (len(shape) != 2 or 0 in shape):  # an empty one may claim any number of rows
        raise InputError(f"{adapter}: tensor {heads[0]} has shape {tuple(shape)}, which is not a classifier's head.")
    return shape[0] if heads else None


def _labels(job, model, hf):
    """A classifier's label names: as given, else as the base names them, else by number; None of a language model."""
    count, named = model.config.num_labels, hf.get("id2label") or {}
    if count is None:
        if job.labels and job.run is None:
            raise InputError(
                f"--labels names a classifier's labels, and {job.adapter} with this base is a language model."
            )
        return None
    if job.labels is None and named.keys() == {str(i) for i in range(count)}:
        return tuple(str(named[str(i)]) for i in range(count))
    labels = job.labels or tuple(f"LABEL_{i}" for i in range(count))
    if len(labels) != count:
        raise InputError(f"{job.adapter} is a classifier of {count} labels, and {len(labels)} are named.")
    return labels
