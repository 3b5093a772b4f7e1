"""Records as a run knows them, made from a table's columns: checked, split, and with numbers for labels.

What is private is the training table of a person: no message here contains a value of it.
"""

import decimal
import re
from typing import NamedTuple

import numpy as np

from dplora_jax.data import tasks
from dplora_jax.data.cells import NoText
from dplora_jax.errors import InputError, Refused

HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")
UNIT = "unit"  # of arrays made of records: the number of each row's unit, where a unit may have several rows
FEW = 8  # different records of a client, fewer of which a public table may hold by chance


class Records(NamedTuple):
    """N records: `texts` are texts or prompts; `labels` is int32 [N], 0 where a task has none; `groups`, the partition column's
    values, and `units`, those of the privacy unit's column, are None unless they were asked for, and `answers` unless the task
    has some."""

    texts: tuple[str, ...]
    labels: np.ndarray
    groups: tuple[str, ...] | None = None
    answers: tuple[str, ...] | None = None
    units: tuple[str, ...] | None = None

    @property
    def count(self):
        """How many units these are; each record is one where there is no column of units."""
        return len(self.texts if self.units is None else set(self.units))


class Corpus(NamedTuple):
    """The training records (private where a person's own), the PUBLIC test records, what is asked of both, and what reports say
    of them."""

    train: Records | None
    test: Records | None
    task: tasks.Task
    description: str
    synthetic: bool

    @property
    def label_names(self):
        """The labels' names in the order of their numbers; none where the task has no labels."""
        return self.task.label_names


class Rows(NamedTuple):
    """A table's columns of use; labels are still the text of their values, and None where there are none."""

    texts: list[str]
    labels: list[str] | None
    answers: list[str] | None
    groups: list[str] | None
    units: list[str] | None = None


def rows(table, task, columns, group=None, unit=None, private=False, public=False):
    """The `columns` ({"text" or "prompt", "label", "answer": name}) of a `tables.Table` -> Rows; `group` and `unit` name more.

    Texts, answers and groups are strings, kept exactly as they are; a label or unit may be a number too, and 1.0 is "1". No cell
    may be missing or empty, but lines of plain text may, and answers of a `public` table (which nobody here can mend): these rows
    are left out. Raises InputError; a private table's columns are counted and not named: without a header line they would be its
    first record.
    """
    columns = columns | ({"group": group} if group else {}) | ({"unit": unit} if unit else {})
    _need(table, columns.values(), private)
    values = {role: _texts(table, role, name, task) for role, name in columns.items()}
    if task.kind == tasks.TEXT:
        values = _kept(
            values, lambda i: values["text"][i].strip() and (task.keep is None or task.keep(values["text"][i]))
        )
    elif public and "answer" in values:
        values = _kept(values, lambda i: values["answer"][i].strip())
    for role, column in values.items():
        missing = sum(not cell.strip() for cell in column)
        if missing:
            raise InputError(
                f"{table.where} has {missing} rows with nothing in column '{columns[role]}'; fill or drop them."
            )
    main = values["prompt" if "prompt" in values else "text"]
    if not main:
        raise InputError(f"{table.where} has no text in it; give a table with records.")
    return Rows(main, values.get("label"), values.get("answer"), values.get("group"), values.get("unit"))


def of_task(table, task):
    """The `tables.Table` that a public one is to `task`: what its step over whole tables makes of it. Raises InputError."""
    if task.rows is None:
        return table
    _need(table, task.needs)
    columns = task.rows(table.columns)
    return table._replace(names=list(dict.fromkeys([*table.names, *columns])), columns=columns)


def choices(table, task):
    """{column: cells} of the `tables.Table` of a "choices" task, of which the last column tells the right answer and the others
    are texts. Raises InputError."""
    _need(table, task.column)
    *texts, _ = task.column
    for name in texts:
        missing = sum(cell is None for cell in table.columns[name])
        if missing:
            raise InputError(f"{table.where} has {missing} rows with nothing in column '{name}'; fill or drop them.")
    return table.columns | {name: _texts(table, "text", name, task) for name in texts}


def _need(table, names, private=False):
    for name in names:
        if name not in table.columns:
            known = (
                f"it has {len(table.names)} (is the name spelled so, and, in CSV, the header line there?)"
                if private
                else f"its columns are {', '.join(sorted(table.names))}"
            )
            raise InputError(f"{table.where} has no column '{name}'; {known}."[:1000])


def _texts(table, role, name, task):
    """The cells of a column as strings, by the rule of its role; "" where one is missing."""
    read = {"label": task.read or tasks.label_of, "answer": task.read, "unit": tasks.label_of}.get(role)
    numbers_too = role in ("label", "unit")
    fitting = object if role == "answer" and read else (str, float, decimal.Decimal) if numbers_too else str
    cells = table.columns[name]
    for cell in cells:
        if cell is not None and (isinstance(cell, NoText) or not isinstance(cell, fitting)):
            kind = cell.kind if isinstance(cell, NoText) else type(cell).__name__
            raise InputError(
                f"{table.where} has values in column '{name}' that are not text ({kind}); save them as text, or name another "
                "column."
            )
    texts = [read(cell) for cell in cells] if read else [cell or "" for cell in cells]
    for number, text in enumerate(texts, start=1):
        if not text.isascii() and HALF_A_CHARACTER.search(text):  # no tokenizer takes it
            raise InputError(
                f"{table.where} has half a character (a lone surrogate) in column '{name}' of record {number}; mend it there."
            )
    return texts


def _kept(values, wanted):
    keep = [i for i in range(len(next(iter(values.values())))) if wanted(i)]
    return {role: [column[i] for i in keep] for role, column in values.items()}


def split(rows, fraction, seed):
    """A random part of size `fraction` of the Rows `rows` held out as the public test -> (rest, part), in the table's order.

    Of questions and answers whole questions are held out: one that has several answers is in one part with all of them. Where
    there are units, it is that part of the units: which, and how many, follows from their names alone, and not from how many rows
    each has.
    """
    if rows.units is not None:
        chosen = _some_units(rows.units, lambda total: round(total * fraction), seed)
        if not 0 < chosen.sum() < len(chosen):
            raise InputError(f"test_fraction={fraction} of the units leaves one part empty; give another.")
        return _taken(rows, np.flatnonzero(~chosen)), _taken(rows, np.flatnonzero(chosen))
    total = len(rows.texts)
    test_count = round(total * fraction)
    if not 0 < test_count < total:
        raise InputError(f"test_fraction={fraction} of {total} rows leaves one part empty; give another.")
    order = np.random.default_rng(seed).permutation(total)
    if rows.answers is not None:
        first = {}
        for rank, index in enumerate(order):
            first.setdefault(rows.texts[index], rank)
        order = order[np.argsort([first[rows.texts[index]] for index in order], kind="stable")]
        while test_count < total and rows.texts[order[test_count]] == rows.texts[order[test_count - 1]]:
            test_count += 1
    return _taken(rows, order[test_count:]), _taken(rows, order[:test_count])


def some(table: Records | None, count, seed):
    """`count` of the Records `table` at random, or of their units with all of their rows, in the table's order; all where there
    are no more, or `count` is None."""
    if table is None or count is None or count >= table.count:
        return table
    if table.units is not None:
        chosen = np.flatnonzero(_some_units(table.units, lambda total: count, (seed, 1)))
    else:
        chosen = np.sort(np.random.default_rng((seed, 1)).permutation(len(table.texts))[:count])
    return take(table, chosen)._replace(groups=table.groups and tuple(table.groups[i] for i in chosen))


def _some_units(units, count, seed):
    """Whether each row is of one of `count(how many)` units, drawn among their sorted names: bool [N]."""
    names, numbers = np.unique(np.asarray(units), return_inverse=True)
    return np.isin(numbers, np.random.default_rng(seed).permutation(len(names))[: count(len(names))])


def _taken(rows, indices):
    return Rows(*(None if column is None else [column[i] for i in np.sort(indices)] for column in rows))


def corpus(train, test, task, codes, about):
    """The Corpus of Rows, with a number (`codes`) for each label's text; InputError counts the labels without one.

    A test table that holds every training record is a copy of the training table: metrics on it would release exact
    statistics of private records. (One that holds some of them may be a public one with duplicates.)
    """
    encoded = []
    for part, rows in (("training", train), ("test", test)):
        if rows is None:
            encoded.append(None)
            continue
        labels = np.zeros(len(rows.texts), np.int32)
        if rows.labels is not None:
            strange = sum(label not in codes for label in rows.labels)
            if strange:
                raise InputError(
                    f"{strange} rows of the {part} table have a label outside the known ones "
                    f"({', '.join(task.label_names)}); mend these rows, or name all labels by `labels`."
                )
            labels = np.array([codes[label] for label in rows.labels], np.int32)
        groups, units = (
            None if values is None or part == "test" else tuple(values) for values in (rows.groups, rows.units)
        )
        answers = None if rows.answers is None else tuple(rows.answers)
        encoded.append(Records(tuple(rows.texts), labels, groups, answers, units))
    if None not in encoded:
        refuse_copy(encoded[:1], columns_of(encoded[1]))
    return Corpus(*encoded, task, about, synthetic=False)


def refuse_copy(parts, columns, what: str = "the test table", role="a public test set"):
    """Raise Refused, whose message does not say why, where `columns` (lists of cells of one table, of which messages speak as
    `what`, and which is to be `role`) hold every record of `parts` (a list of Records, one a client), or of one of them that has
    FEW different ones or more: each text in one column, and each answer too where there are some. Labels may have other numbers
    there: metrics on it would be exact statistics of what is private all the same."""
    public_cells = [{_plain(cell) for cell in column if isinstance(cell, str)} for column in columns]
    wanted = [[set(map(_plain, column)) for column in (part.texts, part.answers or ())] for part in parts]
    whole = [set().union(*sets) for sets in zip(*wanted, strict=True)]
    several = [sets for sets in wanted if max(map(len, sets)) >= FEW]
    for sets, whose in [(whole, ""), *((sets, " of a client") for sets in several)]:
        if any(sets) and all(
            not column_texts or any(column_texts <= cells for cells in public_cells) for column_texts in sets
        ):
            raise Refused(
                f"{what} is refused as {role}: give another.",
                f"{what} holds every training record{whose}, and these are private.",
            )


def columns_of(table: Records):
    """The columns of `table` that `refuse_copy` looks for private records in."""
    return [table.texts, table.answers or ()]


def _plain(text):
    return " ".join(text.split())


def take(table: Records, indices) -> Records:
    """The records at `indices`, without their groups."""
    answers, units = (
        None if column is None else tuple(column[i] for i in indices) for column in (table.answers, table.units)
    )
    return Records(tuple(table.texts[i] for i in indices), table.labels[indices], None, answers, units)


def together(parts) -> Records:
    """Several clients' records (an iterable of Records) as one table."""
    parts = list(parts)
    texts = tuple(text for part in parts for text in part.texts)
    labels = np.concatenate([np.zeros(0, np.int32), *(part.labels for part in parts)])
    answers, units = (
        None if any(column is None for column in columns) else tuple(cell for column in columns for cell in column)
        for columns in ([part.answers for part in parts], [part.units for part in parts])
    )
    return Records(texts, labels, None, answers, units)
