"""What a model family says of itself: its adaptable matrices, its weights' names, the options it refuses."""

import dataclasses
import json
import math

from dplora_jax.errors import InputError
from dplora_jax.models.layers import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class Target:
    """One adaptable matrix, stacked over layers: its kernel's `path` below params["layers"], (inputs, outputs), the short
    names that select it, and its module in the Hugging Face layout with {} for the layer."""

    path: tuple[str, ...]
    shape: tuple[int, int]
    aliases: tuple[str, ...]
    module: str


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter and the Hugging Face tensor that holds it; {} in `name` stands for the layer.

    `part` is "kernel" (stored transposed, [O, I]), "conv1d" (a kernel stored [I, O]), "embedding", "scale" or "bias".
    An optional one that lacks stays zero.
    """

    path: tuple[str, ...]
    name: str
    part: str
    optional: bool = False

    @property
    def tensor(self):
        """The tensor's full name."""
        return f"{self.name}.{'bias' if self.part == 'bias' else 'weight'}"


def refuse_unsupported(hf, allowed):
    """Raise InputError where config.json `hf` sets an option of `allowed` {name: values} to another value."""
    for name, values in allowed.items():
        if hf.get(name, values[0]) not in values:
            raise InputError(
                f"config.json: {name}={hf[name]!r} is not supported, only {' or '.join(map(repr, values))}."
            )


def sizes(hf, *names):
    """The whole numbers above 0 that config.json `hf` gives for `names`; InputError where one lacks or is no such number."""
    for name in names:
        if not isinstance(hf.get(name), int) or isinstance(hf[name], bool) or hf[name] < 1:
            raise InputError(f"config.json: {name}={hf.get(name)!r} must be a whole number above 0.")
    return [hf[name] for name in names]


def number(hf, name, default):
    """The number above 0 that config.json `hf` gives under `name`; InputError where it is another thing."""
    value = hf.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"config.json: {name}={value!r} must be a finite number above 0.")
    return value


def activation(hf, name, default):
    """The activation that config.json `hf` gives under `name`; InputError where it is not known."""
    value = hf.get(name) or default
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise InputError(f"config.json: {name}={value!r} is not supported; known: {', '.join(ACTIVATIONS)}.")
    return value


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
