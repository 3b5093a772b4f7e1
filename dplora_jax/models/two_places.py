"""Where a checkpoint's folder says a thing twice: what transformers makes of it, or a refusal."""

import dataclasses

import numpy as np

from dplora_jax.errors import InputError
from dplora_jax.files import find
from dplora_jax.models.encoder import Encoder
from dplora_jax.models.family import refuse_unsupported

ROWS = 4096  # compared at a time


def refuse_others(hf, checkpoint):
    """Raise InputError where transformers would read other weights than those of model.safetensors, or add to them."""
    refuse_unsupported(hf, {"transformers_weights": (None,), "per_layer_config": (None, {})})
    place = checkpoint.directory
    if not place.is_file() and find(place, "adapter_config.json") is not None:
        raise InputError(
            f"{place} holds adapter_config.json beside config.json: transformers would add that adapter to the model. Merge it "
            "(python -m experiments.export), or move it to a folder of its own."
        )


def untied(model, checkpoint):
    """`model` with an output matrix of its own where its config ties it to the embedding but `checkpoint` holds both and they
    differ: so does transformers 5. Raises InputError on an encoder of that kind, which is not supported."""
    if model.config.num_labels is not None:
        return model
    if isinstance(model, Encoder):
        for copy, original in model.ties.items():
            if checkpoint.has(copy) and (not checkpoint.has(original) or _differ(checkpoint, copy, original)):
                raise InputError(
                    f"{checkpoint.directory}: tensor {copy} differs from {original}, to which it should be tied; an output layer "
                    "of its own is not supported."
                )
        return model
    name = f"{model.tied_name}.weight"
    embedding = next(weight.tensor for weight in model.weights() if weight.path == ("embed", "word"))
    if not model.config.tied or not checkpoint.has(name) or not _differ(checkpoint, name, embedding):
        return model
    return dataclasses.replace(model, config=dataclasses.replace(model.config, tied=False))


def _differ(checkpoint, left, right):
    """Whether two tensors of `checkpoint` hold other numbers; a few rows are in memory at a time."""
    shape = checkpoint.shape(left)
    if shape != checkpoint.shape(right):
        return True
    pieces = (slice(start, min(start + ROWS, shape[0])) for start in range(0, shape[0], ROWS))
    return not all(np.array_equal(checkpoint.read(left, rows), checkpoint.read(right, rows)) for rows in pieces)
