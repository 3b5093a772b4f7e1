"""Public tables from the Hugging Face hub, through the `datasets` library, with a cache of the call's own.

`datasets` is imported where it is used: that takes a second or two, which no other source need pay.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType

from dplora_jax.data.cells import UnreadableError
from dplora_jax.data.tables import Table
from dplora_jax.errors import InputError

HUB_TIMEOUT_SECONDS = 5.0
CACHE = "dplora-"  # how the name of a call's own cache begins; its process's number follows


def read(dataset: str, place, wanted: Collection[str], every: bool = False) -> dict[str, Table]:
    """The Table of each split of a public table at `place` (`tasks.Hub`); its columns are those `wanted`, or `every` one.

    Raises InputError, within seconds where the hub is out of reach.
    """
    try:
        with _datasets() as (datasets, cache):
            import huggingface_hub

            # `load_dataset` retries for minutes where this one request, with a limit, knows at once.
            huggingface_hub.HfApi().dataset_info(place.repository, revision=place.revision, timeout=HUB_TIMEOUT_SECONDS)
            splits = datasets.load_dataset(
                place.repository, revision=place.revision, data_dir=place.folder, cache_dir=cache, keep_in_memory=True
            )
    except Exception as error:
        raise InputError(
            f"{dataset} cannot be fetched from the hub ({place.repository}, {type(error).__name__}); offline, give its files by "
            "`data_dir` (of a benchmark, `benchmarks_dir`), or use dataset=finance_demo, which needs no download."
        ) from None
    return {
        name: _table(f"{place.repository} ({name})", split.data.table, wanted, every) for name, split in splits.items()
    }


def _table(where, table, wanted, every):
    from dplora_jax.data import arrow_table

    try:
        columns = arrow_table.columns(table.schema, table.to_batches(), wanted, every)
    except UnreadableError as error:
        raise InputError(f"{where} {error}") from None
    return Table(where, table.schema.names, columns)


def _sweep():
    """Delete the caches of this user's processes that were killed before they could."""
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
