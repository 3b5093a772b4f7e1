"""Public records to train on: a file with the columns of a run's own table, or the table of a public task, as its own records."""

import pathlib

import numpy as np

from dplora_jax.data import records, sources, tables, tasks
from dplora_jax.data.records import Records
from dplora_jax.errors import InputError

KINDS_IN_WORDS = {
    tasks.LABELS: "texts with labels",
    tasks.ANSWERS: "prompts with answers",
    tasks.TEXT: "texts alone",
    tasks.CHOICES: "choices, to evaluate on alone",
}


def read(given, source, task, renamed):
    """The Records of `given` (the field `public_data`: a file, TASK=FOLDER or TASK) as records of `task`, the run's own of the
    Source `source`. `renamed` {their label: ours} names labels that are called otherwise.

    Of a public task the training table is read, or the first that it has. Raises InputError, also where its records are of
    another kind, or have a label that the run does not know, which is public and may be named.
    """
    table, read_as, columns, label_names = _table(given, source, task)
    rows = records.rows(records.of_task(table, read_as), read_as, columns, public=True)
    labels = np.zeros(len(rows.texts), np.int32)
    if rows.labels is not None:
        known = task.codes if source.dataset in tasks.TASKS else {}
        known = known | {name: i for i, name in enumerate(task.label_names)}
        named = [label_names.get(label, label) for label in rows.labels]
        named = [renamed.get(label, label) for label in named]
        if strange := sorted({label for label in named if label not in known}):
            raise InputError(
                f"public_data={given} has the labels {', '.join(strange[:5])}, and the run's are {', '.join(task.label_names)}: "
                "say by `public_labels` what they are called here, as in bearish:negative."
            )
        labels = np.array([known[label] for label in named], np.int32)
    return Records(tuple(rows.texts), labels, None, None if rows.answers is None else tuple(rows.answers))


def name(given):
    """What reports call it: the task, or the file without the folders that it lies in."""
    task = given.partition("=")[0]
    return task if task in tasks.TASKS else pathlib.Path(given).name


def _table(given, source, task):
    """(the Table of `given`, the Task that it is read as, {role: its column}, {its labels' texts: their names})."""
    public_name, _, folder = given.partition("=")
    if public_name not in tasks.TASKS:
        read_as = tasks.TASKS.get(source.dataset, task)
        roles = {tasks.LABELS: ("text", "label"), tasks.ANSWERS: ("prompt", "answer")}.get(task.kind, ("text",))
        own = {role: getattr(source, f"{role}_column") or read_as.column.get(role, role) for role in roles}
        path = pathlib.Path(given)
        if not path.is_file() and tables.suffix_of(path) is None:
            raise InputError(
                f"public_data={given} is no file, and no task: the tasks are {', '.join(tasks.TRAINABLE)}."
            )
        return tables.read_file(path, [*own.values(), *read_as.needs], form=source.form), read_as, own, {}
    read_as = tasks.TASKS[public_name]
    if read_as.kind != task.kind:
        raise InputError(
            f"public_data={given} has {KINDS_IN_WORDS[read_as.kind]}, and dataset={source.dataset} has "
            f"{KINDS_IN_WORDS[task.kind]}: give public records of the same kind."
        )
    wanted = [*read_as.column.values(), *read_as.needs]
    split_tables, origin = sources.public_tables(public_name, read_as, folder or None, wanted, form=source.form)
    split = next((split for split in sources.SPLITS if split in split_tables), None)
    if split is None:
        raise InputError(f"public_data={given} ({origin}) has no table to train on: it needs train.*.")
    names = {text: read_as.label_names[code] for text, code in read_as.codes.items()}
    return split_tables[split], read_as, read_as.column, names
