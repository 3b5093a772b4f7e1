"""Where records come from: the embedded demos, public benchmarks (local files or the hub), and a person's own tables.

What is private is the training table of a person: no message here contains a value of it, and its labels are never learned
from it.
"""

import decimal
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dplora_jax.data import demos, hub, records, tables, tasks
from dplora_jax.data.records import Corpus, Records, Rows
from dplora_jax.errors import InputError


@dataclass(frozen=True)
class Source:
    """What to load; the fields are those of `config.Data`. `seed` is that of the demos' generators alone."""

    dataset: str
    data_dir: str | None = None
    test_data: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    group_column: str | None = None
    unit_column: str | None = None
    labels: tuple[str, ...] | None = None
    test_fraction: float | None = None
    split_seed: int = 0
    train_records: int | None = None
    test_records: int | None = None
    seed: int = 0
    encoding: str | None = None
    separator: str | None = None

    @property
    def extra_columns(self) -> list[str]:
        """The columns of the training table beside those of the task."""
        return [column for column in (self.group_column, self.unit_column) if column]

    @property
    def form(self) -> tables.TextFormat:
        """How its files of text are written; InputError where the fields do not say."""
        return tables.text_format(self.encoding, self.separator)


OWN_TABLES = {"csv": (".csv", ".tsv"), "jsonl": (".jsonl", ".json"), "parquet": (".parquet",), "text": (".txt",)}
DATASETS = (*demos.DEMOS, *tasks.TRAINABLE, *OWN_TABLES)
BENCHMARK_TEST_FRACTION = 0.2
SPLITS = ("train", "validation", "valid", "test")
TEST_SPLITS = ("test", "validation", "valid", "train")  # a table to evaluate on: the first of these that is there
CHOICE_SPLITS = ("validation", "valid", "test", "train")  # likewise, of tasks whose test labels are kept back


def load(source: Source, need_test: bool = True) -> Corpus:
    """Loads the records that `source` names.

    A benchmark without a test file is split at random by `test_fraction` (0.2 unless given) and `split_seed`. An
    own table is split only where `test_fraction` is given, which declares the part public. Labels of an own table come
    from `labels`, else from the public test rows. `train_records` and `test_records` take so many of each part at random.

    Raises:
      InputError: on an unknown dataset, fields that do not fit, a file or column that is missing or malformed, a label
        outside the known ones, or no public test set where `need_test`; never with the text of a record.
    """
    if source.test_fraction is not None and not 0 < source.test_fraction < 1:
        raise InputError(f"test_fraction={source.test_fraction} must lie between 0 and 1, both excluded.")
    if source.dataset in demos.DEMOS:
        corpus = _load_demo(source)
    elif source.dataset in tasks.TRAINABLE:
        corpus = _load_benchmark(source, tasks.TASKS[source.dataset])
    elif source.dataset in OWN_TABLES:
        corpus = _load_own(source, need_test)
    else:
        only = " (only to evaluate on: `benchmarks`)" if source.dataset in tasks.TASKS else ""
        raise InputError(f"dataset={source.dataset} is unknown{only}; the known ones are {', '.join(DATASETS)}.")
    return corpus._replace(
        train=records.some(corpus.train, source.train_records, source.split_seed),
        test=records.some(corpus.test, source.test_records, source.split_seed),
    )


def _load_demo(source: Source) -> Corpus:
    columns = {"group_column": "partition=column:...", "unit_column": "privacy_unit=column:..."}
    for flag in ("data_dir", "test_data", "labels", *columns, "encoding", "separator"):
        if getattr(source, flag):
            name = columns.get(flag, f"`{flag}`")
            raise InputError(
                f"{name} does not fit dataset={source.dataset}, which has only its own texts; leave it out."
            )
    return demos.load(source.dataset, source.seed)


def _load_benchmark(source: Source, task: tasks.Task) -> Corpus:
    if source.labels:
        raise InputError(f"`labels` does not fit dataset={source.dataset}, whose labels are known; leave it out.")
    given = {
        "text": source.text_column,
        "label": source.label_column,
        "prompt": source.prompt_column,
        "answer": source.answer_column,
    }
    columns = {role: given[role] or name for role, name in task.columns}
    wanted = [*columns.values(), *task.needs, *source.extra_columns]
    split_tables, origin = public_tables(source.dataset, task, source.data_dir, wanted, form=source.form)
    split_tables = {split: records.of_task(table, task) for split, table in split_tables.items()}
    if not split_tables:
        raise InputError(
            f"{source.data_dir or task.hub.repository} has no table to train on for dataset={source.dataset}; it needs "
            f"train.* (or one of test.* and validation.* alone) as {', '.join(tables.SUFFIXES)}."
        )
    main = next(name for name in SPLITS if name in split_tables)
    table = split_tables.pop(main)
    train, test = records.rows(table, task, columns, source.group_column, source.unit_column, public=True), None
    if source.test_data is not None:
        wanted = columns | {name: name for name in task.needs}
        test = _read_test(source, wanted, None, source.data_dir and table.where)
        test = records.rows(records.of_task(test, task), task, columns, public=True)
    elif split_tables:
        test = records.rows(
            split_tables[next(name for name in TEST_SPLITS if name in split_tables)], task, columns, public=True
        )
    description = f"{source.dataset}: public benchmark ({origin})"
    if test is not None and source.test_fraction is not None:
        raise InputError(f"`test_fraction` does not fit dataset={source.dataset} with a test file; leave it out.")
    if test is None:
        fraction = BENCHMARK_TEST_FRACTION if source.test_fraction is None else source.test_fraction
        train, test = records.split(train, fraction, source.split_seed)
        description += f"; test: a random {fraction:g} of the table, split_seed {source.split_seed}"
    return records.corpus(train, test, task, task.codes, description)


def public_tables(name, task, folder, wanted, every=False, form=tables.PLAIN):
    """({split: Table}, what reports say of where it is from) of a public table, from a folder or the hub."""
    if folder is not None:
        paths = {split: tables.find(folder, split, tables.SUFFIXES) for split in SPLITS}
        split_tables = {split: tables.read_file(path, wanted, every, form) for split, path in paths.items() if path}
        return split_tables, "local files"
    if task.hub is None:
        raise InputError(f"{name} is not on the hub in a form that needs no code; give the folder with its table.")
    split_tables = hub.read(name, task.hub, wanted, every)
    split_tables = {split: table for split, table in split_tables.items() if split in SPLITS}
    return split_tables, f"{task.hub.repository}, revision {task.hub.revision}, from the hub"


def benchmark(
    name: str,
    folder: str | None,
    count: int | None = None,
    seed: int = 0,
    private: Sequence[Records] = (),
    chat: bool = False,
    form: tables.TextFormat = tables.PLAIN,
) -> list[tasks.Asked]:
    """The records of a public benchmark to evaluate on, as a language model is asked them: `count` at random, or all.

    `folder` has its table, as test.*, validation.* or train.* (in this order; of choices validation.* first, since the hub keeps
    their test's labels back); None reads the hub. Raises InputError, also where it holds every one of the
    `private` records, or of one client's (`records.refuse_copy`).
    """
    task = known(name)
    split_tables, _ = public_tables(name, task, folder, task.column.values(), every=True, form=form)
    split = next((s for s in (CHOICE_SPLITS if task.kind == tasks.CHOICES else TEST_SPLITS) if s in split_tables), None)
    if split is None:
        raise InputError(f"{folder or task.hub.repository} has no table of {name}: test.*, validation.* or train.*.")
    table = split_tables[split]
    cells = table.columns.values()
    table = records.of_task(table, task)
    records.refuse_copy(private, [*cells, *table.columns.values()], f"benchmarks={name}")
    if task.kind != tasks.CHOICES:
        asked_records = records.rows(table, task, task.column, public=True)
        asked_records = records.corpus(None, asked_records, task, task.codes, name).test
        return tasks.asked(task, records.some(asked_records, count, seed), chat)
    cells = records.choices(table, task)
    total = len(next(iter(cells.values())))
    chosen = range(total) if count is None else np.sort(np.random.default_rng(seed).permutation(total)[:count])
    asked = [task.ask({column: asked_records[i] for column, asked_records in cells.items()}) for i in chosen]
    lost = sum(not 0 <= one.right < len(one.answers) for one in asked)
    if lost:
        raise InputError(f"{table.where} does not tell the right answer of {lost} rows: give the validation table.")
    return asked


def known(name: str) -> tasks.Task:
    """The public task of that name; InputError where there is none."""
    if name not in tasks.TASKS:
        raise InputError(f"benchmark {name!r} is unknown; the known ones are {', '.join(tasks.TASKS)}.")
    return tasks.TASKS[name]


def own_columns(source: Source, read: bool = True) -> tuple[str, dict[str, str]]:
    """(the kind of an own table's task, {role: column}), from which columns are named; all that are needed where one is
    `read`."""
    answers = source.prompt_column is not None or source.answer_column is not None
    labels = source.label_column is not None
    if answers and (labels or source.text_column):
        raise InputError(
            "`prompt_column` and `answer_column` go together, and `text_column` and `label_column` do: give one pair."
        )
    if answers:
        kind, roles = tasks.ANSWERS, {"prompt": "prompt_column", "answer": "answer_column"}
    elif labels or source.labels:
        kind, roles = tasks.LABELS, {"text": "text_column", "label": "label_column"}
    else:
        kind, roles = tasks.TEXT, {"text": "text_column"}
    columns = {role: getattr(source, flag) for role, flag in roles.items()}
    if source.dataset == "text":
        if kind != tasks.TEXT:
            raise InputError("dataset=text has a record a line and no columns; leave out the fields that name some.")
        columns["text"] = columns["text"] or "text"
    needed = {"data_dir": source.data_dir} | {flag: columns[role] for role, flag in roles.items()}
    for flag, given in needed.items():
        if read and not given:
            raise InputError(f"dataset={source.dataset} reads your own table and needs `{flag}`; give it.")
    return kind, columns


def _load_own(source: Source, need_test: bool) -> Corpus:
    kind, columns = own_columns(source)
    suffixes = OWN_TABLES[source.dataset]
    path = tables.find(source.data_dir, "train", suffixes)
    if path is None:
        raise InputError(f"{source.data_dir} has no train{' or train'.join(suffixes)}; put the training table there.")
    test_path, task = _public_test(source, need_test), tasks.own_table(kind)
    wanted = [*columns.values(), *source.extra_columns]
    train = tables.read_file(path, wanted, form=source.form)
    train = records.rows(train, task, columns, source.group_column, source.unit_column, private=True)
    test = test_path and records.rows(_read_test(source, columns, test_path, path), task, columns)
    description = f"{source.dataset}: one's own table"
    if source.test_fraction is not None:
        train, test = records.split(train, source.test_fraction, source.split_seed)
        description += f"; test: a part declared public, {source.test_fraction:g} of it, split_seed {source.split_seed}"
    names = _label_names(source, test) if kind == tasks.LABELS else ()
    codes = {name: i for i, name in enumerate(names)}
    return records.corpus(train, test, tasks.own_table(kind, names), codes, description)


def _public_test(source: Source, need_test: bool) -> Path | None:
    """The file of an own table's public test set, if there is one; InputError where one is needed, or named beside a split."""
    suffixes = OWN_TABLES[source.dataset]
    test_path = tables.find(source.data_dir, "test", suffixes) if source.data_dir else None
    has_test = source.test_data is not None or test_path is not None
    if has_test and source.test_fraction is not None:
        raise InputError(
            "`test_fraction` would declare a part of train.* public, though there is a test table; drop one."
        )
    if need_test and not has_test and source.test_fraction is None:
        raise InputError(
            f"{source.data_dir} has no public test set to evaluate on; give `test_data` (or test{suffixes[0]} beside "
            "train), or `test_fraction` to declare a random part of train public, or `private_test`, or eval_every=0."
        )
    return Path(source.test_data) if source.test_data else test_path


def load_public(source: Source, need_test: bool) -> Corpus:
    """What is public where each client's own table lies in a folder of its own (`folders`): a Corpus whose `train` is None."""
    path = _public_test(source, need_test)
    kind, columns = own_columns(source, read=path is not None and source.test_data is None)
    test = path and records.rows(_read_test(source, columns, path), tasks.own_table(kind), columns)
    names = _label_names(source, test) if kind == tasks.LABELS else ()
    about = f"{source.dataset}: each client's own table"
    codes = {name: i for i, name in enumerate(names)}
    corpus = records.corpus(None, test, tasks.own_table(kind, names), codes, about)
    return corpus._replace(test=records.some(corpus.test, source.test_records, source.split_seed))


def _read_test(source, columns, beside: Path | None, private: Path | str | None = None) -> tables.Table:
    path = beside if source.test_data is None else Path(source.test_data)
    named = (
        source.data_dir is not None
        and Path(source.data_dir).resolve() in path.resolve().parents
        and tables.stem_of(path) == "train"
    )
    if named or (private is not None and path.exists() and path.samefile(private)):
        raise InputError(f"{path} is the training table itself, which is private and no test set; give another file.")
    return tables.read_file(path, columns.values(), form=source.form)


def _label_names(source: Source, test: Rows | None) -> tuple[str, ...]:
    """The labels of a person's own table, from the flag or from public rows; never from private ones."""
    if source.labels is None and test is None:
        raise InputError("the labels are not known, and private rows must not tell them; give `labels`.")
    if source.labels is not None:
        names = tuple(tasks.label_of(label) for label in source.labels)
    else:
        numbers = all(re.fullmatch(r"-?\d+", label) for label in test.labels)
        names = tuple(sorted(set(test.labels), key=decimal.Decimal if numbers else None))
    if len(names) < 2 or len(set(names)) < len(names) or "" in names:
        origin = "`labels`" if source.labels is not None else "the public test set's labels"
        raise InputError(f"{origin} must be two or more different ones, not {', '.join(names)}; give `labels`.")
    return names
