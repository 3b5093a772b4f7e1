"""Reads tables through the `datasets` library, leaving no copy behind and letting no text into a message.

`datasets` is imported where it is used: that takes a second or two, which the embedded demo need not pay.
"""

import contextlib
import csv
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from dplora_jax.errors import InputError

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
HUB_TIMEOUT_SECONDS = 5.0
CACHE = "dplora-"  # how the name of a call's own cache begins; its process's number follows


def find(folder: str, stem: str, suffixes: tuple[str, ...]) -> Path | None:
    """The file of that stem with one of the suffixes, or None; InputError where there are two, or no such folder."""
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"--data_dir={folder} is not a folder; give the folder that holds the tables.")
    found = [root / (stem + suffix) for suffix in suffixes if (root / (stem + suffix)).is_file()]
    if len(found) > 1:
        raise InputError(f"{folder} has more than one {stem} table ({', '.join(p.name for p in found)}); keep one.")
    return found[0] if found else None


def read_file(path: Path) -> dict[str, list]:
    """The columns of a CSV (all as text), JSON-lines, JSON or Parquet file, each a list with one value a row."""
    if path.suffix not in READERS:
        raise InputError(f"{path} is of no known kind; give one of {', '.join(READERS)}.")
    if not path.is_file():
        raise InputError(f"{path} is not there; give the path of a table.")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; give a table with records.")
    table = None
    with _datasets() as (datasets, cache):
        try:
            options = _csv_options(datasets, path) if path.suffix == ".csv" else {}
            files = {"train": [str(path)]}
            splits = datasets.load_dataset(
                READERS[path.suffix], data_files=files, cache_dir=cache, keep_in_memory=True, **options
            )
            table = splits["train"].to_dict() if "train" in splits else {}
        except Exception:
            table = None
    # Raised outside the handler, so that not even the error's context holds what the parser quoted of a record.
    if table is None:
        kind = {"json": "JSON", "csv": "CSV in UTF-8", "parquet": "Parquet", "text": "text in UTF-8"}[
            READERS[path.suffix]
        ]
        raise InputError(f"{path} cannot be read as {kind}: it has no rows, is malformed or not readable; mend it.")
    if not any(table.values()):
        raise InputError(f"{path} has no rows; give a table with records.")
    return table


def read_hub(dataset: str, hub_id: str, revision: str, folder: str | None) -> dict[str, dict[str, list]]:
    """The columns of each split of a public table on the hub; InputError within seconds where it is out of reach."""
    try:
        with _datasets() as (datasets, cache):
            import huggingface_hub

            # `load_dataset` retries for minutes where this one request, with a limit, knows at once.
            huggingface_hub.HfApi().dataset_info(hub_id, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
            splits = datasets.load_dataset(
                hub_id, revision=revision, data_dir=folder, cache_dir=cache, keep_in_memory=True
            )
            return {name: split.to_dict() for name, split in splits.items()}
    except Exception as error:
        failure = type(error).__name__
    raise InputError(
        f"{dataset} cannot be fetched from the hub ({hub_id}, {failure}); offline, give its files by --data_dir (of a "
        "benchmark, --benchmarks_dir), or use --dataset=finance_demo, which needs no download."
    )


def _csv_options(datasets: ModuleType, path: Path) -> dict:
    """Every column as text, so that "NA" or "01" stays itself; ValueError where a row does not fit the header."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = (row for row in csv.reader(file) if row)
        header, first = next(rows), next(rows, None)
    # pandas would take the first of one cell too many for a row's name, and shift every column.
    if first is not None and len(first) != len(header):
        raise ValueError("the first row does not have as many cells as the header")
    text = datasets.Value("string")
    features = datasets.Features(dict.fromkeys(header, text))
    return {"features": features, "keep_default_na": False, "encoding": "utf-8-sig"}


def _sweep():
    """Delete the caches of this user's processes that were killed before they could: private text lies in them."""
    for left in Path(tempfile.gettempdir()).glob(f"{CACHE}*-*"):
        owner = left.name.removeprefix(CACHE).split("-")[0]
        if owner.isdigit() and not _alive(int(owner)) and left.stat().st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)


def _alive(process):
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def _datasets() -> Iterator[tuple[ModuleType, str]]:
    """The `datasets` library, silent and counting no downloads, with a cache folder of mode 0700 deleted at the end."""
    import datasets

    verbosity, bars_were_off = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    counted = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    _sweep()
    cache = tempfile.mkdtemp(prefix=f"{CACHE}{os.getpid()}-")
    try:
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors quote the line that they are about
        datasets.disable_progress_bars()
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
        yield datasets, cache
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counted
        datasets.logging.set_verbosity(verbosity)
        if not bars_were_off:
            datasets.enable_progress_bars()
        shutil.rmtree(cache)
