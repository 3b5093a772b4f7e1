"""The configuration of a run: nested frozen dataclasses, one for each concern.

A script, a notebook and the command line build the same. A field says once its name, its default, its meaning, its range and
what it decides.
"""

import dataclasses
import types
import typing
from typing import Any

from dplora_jax.config.federation import (
    Aggregation,
    Execution,
    FederationConfig,
    Lora,
    Optimizer,
    Privacy,
    PrivateTest,
    Schedule,
)
from dplora_jax.config.field import DISPLAY, LAYOUT, METRICS, PROCESS, RESULT
from dplora_jax.config.run import Base, Data, Evaluation, Output, Public, RunConfig
from dplora_jax.errors import InputError

__all__ = [
    "DISPLAY", "FIELDS", "LAYOUT", "METRICS", "PROCESS", "RESULT", "Aggregation", "Base", "Data", "Evaluation", "Execution",
    "FederationConfig", "Field", "Lora", "Optimizer", "Output", "Privacy", "PrivateTest", "Public", "RunConfig", "Schedule",
    "deciding", "field_value", "fields", "from_flat", "from_text", "replace", "to_flat",
]  # fmt: skip


class Field(typing.NamedTuple):
    """A field of a RunConfig by its name on the command line: `section` and `name` say where it stands, `kind` is its type and
    `items` that of its items where it is a tuple; `optional` says whether None is a value."""

    flag: str
    section: str
    name: str
    kind: type
    items: type | None
    optional: bool
    default: Any
    metadata: Any


def _fields():
    for part in dataclasses.fields(RunConfig):
        for entry in dataclasses.fields(part.default_factory):
            kinds = [entry.type] if not isinstance(entry.type, types.UnionType) else list(typing.get_args(entry.type))
            optional = types.NoneType in kinds
            (kind,) = (kind for kind in kinds if kind is not types.NoneType)
            items = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None
            flag = entry.metadata["flag"] or entry.name
            yield Field(
                flag,
                part.name,
                entry.name,
                typing.get_origin(kind) or kind,
                items,
                optional,
                entry.default,
                entry.metadata,
            )


FIELDS = {entry.flag: entry for entry in _fields()}


def fields(config=RunConfig):
    """{flag: Field} of a FederationConfig or a RunConfig (or their types)."""
    sections = {part.name for part in dataclasses.fields(config)}
    return {name: entry for name, entry in FIELDS.items() if entry.section in sections}


def field_value(config, flag):
    """The value of the field that is called `flag` on the command line."""
    entry = FIELDS[flag]
    return getattr(getattr(config, entry.section), entry.name)


def replace(config, **values):
    """`config` with other values for some fields, by their names on the command line.

    >>> replace(RunConfig(), rank=8, epsilon=2.0).lora.rank
    8
    """
    parts = {}
    for flag, new in values.items():
        if flag not in fields(config):
            raise InputError(f"{flag!r} is not a field of the configuration.")
        entry = FIELDS[flag]
        parts.setdefault(entry.section, {})[entry.name] = new
    return dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **new) for part, new in parts.items()}
    )


def to_flat(config):
    """{flag: value}, tuples as comma-separated text: what config.json says."""
    return {
        flag: ",".join(map(str, held)) or None if isinstance(held := field_value(config, flag), tuple) else held
        for flag in fields(config)
    }


def from_flat(values, kind=RunConfig):
    """A configuration from {flag: value} as `to_flat` makes it; fields that are missing have their defaults."""
    return replace(kind(), **{flag: from_text(FIELDS[flag], held) for flag, held in values.items()})


def from_text(entry, held):
    """The value of the Field `entry` that `held` stands for, where it is a tuple and that is comma-separated text."""
    if entry.items is None or not isinstance(held, str | None):
        return held
    if held is None:
        return None if entry.optional else ()
    try:
        return tuple(entry.items(part.strip()) for part in held.split(",") if part.strip())
    except ValueError:
        raise InputError(f"{entry.flag}={held} must be whole numbers with commas between.") from None


def deciding(*kinds):
    """The flags of all fields that decide one of `kinds` (RESULT, LAYOUT, ...)."""
    return [flag for flag, entry in FIELDS.items() if entry.metadata["decides"] in kinds]
