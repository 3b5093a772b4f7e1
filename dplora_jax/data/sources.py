"""Where records come from: the embedded demo, public benchmarks (local files or the hub), and a person's own tables.

What is private is the training table of a person: no message here contains a value of it, its labels are never learned
from it, and the cache that the `datasets` library writes on reading is private to the call and deleted with it.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dplora_jax.data import finance_demo, tables
from dplora_jax.data.benchmarks import BENCHMARKS, Benchmark
from dplora_jax.errors import InputError


class Records(NamedTuple):
    """N records: `labels` is int32 [N]; `groups`, the partition column's values, is None unless one was asked for."""

    texts: tuple[str, ...]
    labels: np.ndarray
    groups: tuple[str, ...] | None


class Corpus(NamedTuple):
    """The training records (private where a person's own), the PUBLIC test records, and what reports say of both."""

    train: Records
    test: Records | None
    label_names: tuple[str, ...]
    description: str
    synthetic: bool


@dataclass(frozen=True)
class Source:
    """What to load; the fields are the flags of the same names. `seed` is that of the demo's generator alone."""

    dataset: str
    data_dir: str | None = None
    test_data: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    group_column: str | None = None
    labels: tuple[str, ...] | None = None
    test_fraction: float | None = None
    split_seed: int = 0
    seed: int = 0


OWN_TABLES = {"csv": (".csv",), "jsonl": (".jsonl", ".json"), "parquet": (".parquet",)}
DATASETS = ("finance_demo", *BENCHMARKS, *OWN_TABLES)
BENCHMARK_TEST_FRACTION = 0.2


class _Rows(NamedTuple):
    """A table's columns of use; labels are still the text of their values."""

    texts: list[str]
    labels: list[str]
    groups: list[str] | None


def load(source: Source, need_test: bool = True) -> Corpus:
    """Loads the records that `source` names.

    A benchmark without a test file is split at random by `test_fraction` (0.2 unless given) and `split_seed`. An
    own table is split only where `test_fraction` is given, which declares the part public. Labels of an own table come
    from `labels`, else from the public test rows.

    Raises:
      InputError: on an unknown dataset, flags that do not fit, a file or column that is missing or malformed, a label
        outside the known ones, or no public test set where `need_test`; never with the text of a record.
    """
    if source.test_fraction is not None and not 0 < source.test_fraction < 1:
        raise InputError(f"--test_fraction={source.test_fraction} must lie between 0 and 1, both excluded.")
    if source.dataset == "finance_demo":
        return _load_demo(source)
    if source.dataset in BENCHMARKS:
        return _load_benchmark(source, BENCHMARKS[source.dataset])
    if source.dataset in OWN_TABLES:
        return _load_own(source, need_test)
    raise InputError(f"--dataset={source.dataset} is unknown; the known ones are {', '.join(DATASETS)}.")


def _load_demo(source: Source) -> Corpus:
    for flag in ("data_dir", "test_data", "labels", "group_column"):
        if getattr(source, flag):
            name = "partition=column:..." if flag == "group_column" else flag
            raise InputError(
                f"--{name} does not fit --dataset=finance_demo, which has only its own texts; leave it out."
            )
    parts = finance_demo.generate(source.seed)
    train, test = (Records(tuple(t), np.array(y, np.int32), None) for t, y in (parts["train"], parts["test"]))
    return Corpus(train, test, finance_demo.LABEL_NAMES, f"finance_demo: {finance_demo.DESCRIPTION}", synthetic=True)


def _load_benchmark(source: Source, benchmark: Benchmark) -> Corpus:
    if source.labels:
        raise InputError(f"--labels does not fit --dataset={source.dataset}, whose labels are known; leave it out.")
    text = source.text_column or benchmark.text_column
    label = source.label_column or benchmark.label_column
    wanted = ("train", "test", "validation")
    if source.data_dir is None:
        found = tables.read_hub(source.dataset, benchmark.hub_id, benchmark.hub_revision, benchmark.hub_folder)
        found = {name: (table, f"{benchmark.hub_id} ({name})") for name, table in found.items() if name in wanted}
        origin = f"{benchmark.hub_id}, revision {benchmark.hub_revision}, from the hub"
    else:
        paths = {name: tables.find(source.data_dir, name, tuple(tables.READERS)) for name in wanted}
        found = {name: (tables.read_file(path), str(path)) for name, path in paths.items() if path}
        origin = "local files"
    if not found or ("train" not in found and len(found) > 1):
        raise InputError(
            f"{source.data_dir or benchmark.hub_id} has no table to train on for --dataset={source.dataset}; it needs "
            f"train.* (or one of test.* and validation.* alone) as {', '.join(tables.READERS)}."
        )
    main = "train" if "train" in found else next(iter(found))
    train = _rows(*found.pop(main), text, label, source.group_column)
    test, own = None, source.data_dir and paths[main]
    if source.test_data is not None:
        test = _rows(*_read_test(source, None, own), text, label, None)
    elif found:
        test = _rows(*found.get("test", found.get("validation")), text, label, None)
    names = benchmark.label_names
    codes = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    description = f"{source.dataset}: public benchmark ({origin})"
    if test is not None and source.test_fraction is not None:
        raise InputError(f"--test_fraction does not fit --dataset={source.dataset} with a test file; leave it out.")
    if test is None:
        fraction = BENCHMARK_TEST_FRACTION if source.test_fraction is None else source.test_fraction
        train, test = _split(train, fraction, source.split_seed)
        description += f"; test: a random {fraction:g} of the table, split_seed {source.split_seed}"
    return _corpus(train, test, names, codes, description)


def _load_own(source: Source, need_test: bool) -> Corpus:
    for flag in ("data_dir", "text_column", "label_column"):
        if not getattr(source, flag):
            raise InputError(f"--dataset={source.dataset} reads your own table and needs --{flag}; give it.")
    suffixes = OWN_TABLES[source.dataset]
    path = tables.find(source.data_dir, "train", suffixes)
    if path is None:
        raise InputError(f"{source.data_dir} has no train{' or train'.join(suffixes)}; put the training table there.")
    test_path = _public_test(source, need_test)
    columns = source.text_column, source.label_column, source.group_column
    train = _rows(tables.read_file(path), str(path), *columns, private=True)
    test = test_path and _rows(*_read_test(source, test_path, path), source.text_column, source.label_column, None)
    description = f"{source.dataset}: one's own table"
    if source.test_fraction is not None:
        train, test = _split(train, source.test_fraction, source.split_seed)
        description += f"; test: a part declared public, {source.test_fraction:g} of it, split_seed {source.split_seed}"
    names = _label_names(source, test)
    return _corpus(train, test, names, {name: i for i, name in enumerate(names)}, description)


def _public_test(source: Source, need_test: bool) -> Path | None:
    """The file of an own table's public test set, if there is one; InputError where one is needed, or named beside a split."""
    suffixes = OWN_TABLES[source.dataset]
    test_path = tables.find(source.data_dir, "test", suffixes)
    has_test = source.test_data is not None or test_path is not None
    if has_test and source.test_fraction is not None:
        raise InputError(
            "--test_fraction would declare a part of train.* public, though there is a test table; drop one."
        )
    if need_test and not has_test and source.test_fraction is None:
        raise InputError(
            f"{source.data_dir} has no public test set to evaluate on; give --test_data (or test{suffixes[0]} beside "
            "train), or --test_fraction to declare a random part of train public, or --eval_every=0."
        )
    return Path(source.test_data) if source.test_data else test_path


def load_public(source: Source, need_test: bool) -> Corpus:
    """What is public where each client's own table lies in a folder of its own (`folders`): a Corpus whose `train` is None."""
    path = _public_test(source, need_test)
    test = path and _rows(*_read_test(source, path), source.text_column, source.label_column, None)
    names = _label_names(source, test)
    about = f"{source.dataset}: each client's own table"
    return _corpus(None, test, names, {name: i for i, name in enumerate(names)}, about)


def _read_test(source: Source, beside: Path | None, private: Path | None = None) -> tuple[dict[str, list], str]:
    path = beside if source.test_data is None else Path(source.test_data)
    named = (
        source.data_dir is not None
        and Path(source.data_dir).resolve() in path.resolve().parents
        and path.stem == "train"
    )
    if named or (private is not None and path.exists() and path.samefile(private)):
        raise InputError(f"{path} is the training table itself, which is private and no test set; give another file.")
    return tables.read_file(path), str(path)


def _rows(table: dict[str, list], where: str, text: str, label: str, group: str | None, private: bool = False) -> _Rows:
    """The columns of use, checked: each is there, and no cell is missing or empty. A private table's columns are counted and
    not named: without a header line they would be its first record."""
    columns = {"text": text, "label": label} | ({"group": group} if group else {})
    for name in columns.values():
        if name not in table:
            known = (
                f"it has {len(table)} (is the header line there?)"
                if private
                else f"its columns are {', '.join(sorted(table))}"
            )
            raise InputError(f"{where} has no column '{name}'; {known}."[:1000])
    if any(not isinstance(value, str) for value in table[text] if value is not None):
        raise InputError(f"{where} has values in column '{text}' that are not text; name a text column.")
    texts = [value or "" for value in table[text]]
    values = {name: [_normal(value) for value in table[columns[name]]] for name in columns if name != "text"}
    for role, cells in (("text", texts), *values.items()):
        missing = sum(not cell.strip() for cell in cells)
        if missing:
            raise InputError(f"{where} has {missing} rows with nothing in column '{columns[role]}'; fill or drop them.")
    return _Rows(texts, values["label"], values.get("group"))


def _normal(value: object) -> str:
    """A label or group as text: 1, 1.0 and "1.0" are all "1"; a missing value is ""."""
    if value is None or value != value:
        return ""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", str(value).strip())


def _label_names(source: Source, test: _Rows | None) -> tuple[str, ...]:
    """The labels of a person's own table, from the flag or from public rows; never from private ones."""
    if source.labels is None and test is None:
        raise InputError("the labels are not known, and private rows must not tell them; give --labels.")
    if source.labels is not None:
        names = tuple(_normal(label) for label in source.labels)
    else:
        numbers = all(re.fullmatch(r"-?\d+", label) for label in test.labels)
        names = tuple(sorted(set(test.labels), key=int if numbers else None))
    if len(names) < 2 or len(set(names)) < len(names) or "" in names:
        origin = "--labels" if source.labels is not None else "the public test set's labels"
        raise InputError(f"{origin} must be two or more different ones, not {', '.join(names)}; give --labels.")
    return names


def _split(rows: _Rows, fraction: float, seed: int) -> tuple[_Rows, _Rows]:
    """A random part of size `fraction` held out as the public test; both parts keep the order of the table."""
    total = len(rows.texts)
    held = round(total * fraction)
    if not 0 < held < total:
        raise InputError(f"--test_fraction={fraction} of {total} rows leaves one part empty; give another.")
    order = np.random.default_rng(seed).permutation(total)

    def take(indices):
        return _Rows(*(None if column is None else [column[i] for i in np.sort(indices)] for column in rows))

    return take(order[held:]), take(order[:held])


def _corpus(
    train: _Rows | None, test: _Rows | None, names: tuple[str, ...], codes: dict[str, int], about: str
) -> Corpus:
    """Turns each label's text into its code; InputError counts the labels without one, and quotes none.

    A test table that holds every training record is a copy of the training table: metrics on it would release exact
    statistics of private records. (One that holds some of them may be a public one with duplicates.)
    """
    encoded = []
    for part, rows in (("training", train), ("test", test)):
        if rows is None:
            encoded.append(None)
            continue
        strange = sum(label not in codes for label in rows.labels)
        if strange:
            raise InputError(
                f"{strange} rows of the {part} table have a label outside the known ones ({', '.join(names)}); "
                "mend these rows, or name all labels by --labels."
            )
        labels = np.array([codes[label] for label in rows.labels], np.int32)
        groups = None if rows.groups is None or part == "test" else tuple(rows.groups)
        encoded.append(Records(tuple(rows.texts), labels, groups))
    train, test = encoded
    refuse_copy(train, test)
    return Corpus(train, test, names, about, synthetic=False)


def refuse_copy(train: Records | None, test: Records | None):
    """InputError where every record of `train` is in `test` too."""
    if train is not None and test is not None and not _counted(train) - _counted(test):
        raise InputError("the test table holds every training record, and these are private; give a public test set.")


def _counted(records: Records) -> Counter:
    return Counter(zip(records.texts, records.labels.tolist(), strict=True))
