"""Parquet, and tables that are Arrow's already: strings as they are, and the names of `datasets`' ClassLabels."""

import json

import pyarrow as pa
import pyarrow.parquet

from dplora_jax.data.cells import NoText, UnreadableError, refuse_twice

WRITTEN_ONE_WAY = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_date32)
AS_IT_IS = (
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null),
    *(pa.types.is_floating, pa.types.is_decimal, pa.types.is_list, pa.types.is_large_list, pa.types.is_struct),
)


def read(file, wanted, every):
    """(the names of all columns, {name: cells} of those `wanted`, or of `every` one) of an open Parquet file; UnreadableError."""
    parquet = pyarrow.parquet.ParquetFile(file)
    names = list(parquet.schema_arrow.names)
    if not parquet.metadata.num_rows:
        raise UnreadableError("has no rows; give a table with records.")
    taken = [name for name in names if every or name in wanted]
    batches = parquet.iter_batches(columns=taken) if taken else ()
    return names, columns(parquet.schema_arrow, batches, wanted, every)


def columns(schema, batches, wanted, every):
    """{name: cells} of the record batches of a table of `schema`: of the columns `wanted`, or of `every` one."""
    names = schema.names
    refuse_twice(names, names if every else wanted)
    classes = _class_names(schema)
    columns = {name: [] for name in names if every or name in wanted}
    for batch in batches:
        for name, cells in columns.items():
            cells += _cells(batch.column(batch.schema.get_field_index(name)), classes.get(name))
    return columns


def _class_names(schema):
    """{column: its labels' names} as `datasets` writes them into a schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        labels = {name: feature["names"] for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
    return {name: names for name, names in labels.items() if names}


def _cells(array, names):
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if names and pa.types.is_integer(array.type):
        numbers = array.to_pylist()
        if any(number is not None and number >= len(names) for number in numbers):
            raise UnreadableError(
                "has label numbers beyond the names in its own schema; write it anew with `datasets`."
            )
        return [None if number is None or number < 0 else names[number] for number in numbers]  # -1 is "not known"
    if any(fits(array.type) for fits in WRITTEN_ONE_WAY):
        array = array.cast(pa.string())
    elif not any(fits(array.type) for fits in AS_IT_IS):
        return [NoText(str(array.type))] * len(array)
    return array.to_pylist()
