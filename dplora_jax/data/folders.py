"""Each client's own table in a folder of its own, `data_dir/<client>/train.*`: who runs a client reads that one alone."""

import dataclasses
from pathlib import Path

from dplora_jax.data import records, sources, tables
from dplora_jax.errors import InputError, unreadable


def names(source, clients):
    """The clients' folders in `data_dir`, in sorted order: no table is opened.

    Raises InputError where they are not as many as `clients`, where two hold one file (a link), or where the fields ask for what
    folders do not have.
    """
    if source.dataset not in sources.OWN_TABLES:
        raise InputError(
            f"partition=folders reads your own tables, not dataset={source.dataset}; give csv, jsonl or parquet."
        )
    sources.own_columns(source)
    if source.test_fraction is not None:
        raise InputError(
            "`test_fraction` would declare a part of each client's table public; with partition=folders give `test_data`, "
            "or eval_every=0."
        )
    root = Path(source.data_dir)
    if not root.is_dir():
        raise InputError(f"data_dir={source.data_dir} is not a folder; give the one that holds the clients' folders.")
    try:
        folder_names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise unreadable(error, f"{root} cannot be read ({error.strerror}); let this process read it.") from None
    if len(folder_names) != clients:
        raise InputError(
            f"{source.data_dir} has {len(folder_names)} folders, one a client; give clients={len(folder_names)}."
        )
    _refuse_shared(root, folder_names, sources.OWN_TABLES[source.dataset])
    return folder_names


def _refuse_shared(root, folders, suffixes):
    """InputError where the tables of two clients are one file: each of its records would be trained on by both."""
    owners = {}
    for name in folders:
        try:
            path = tables.find(str(root / name), "train", suffixes)
            file = path and path.stat()
        except (OSError, InputError):  # another process's own; or `read` will say what is wrong
            continue
        if file and owners.setdefault((file.st_dev, file.st_ino), name) != name:
            other = owners[file.st_dev, file.st_ino]
            raise InputError(
                f"{root / other} and {root / name} hold one file, so that its records would be two clients'; give each its own."
            )


def read(source, corpus, name):
    """The records of the client whose folder is `name`; `corpus` (`sources.load_public`) knows the labels and the test set.

    Raises InputError as `sources.load` does, and where the public test set holds every record of the client.
    """
    folder = Path(source.data_dir) / name
    labels = corpus.label_names or None
    client_source = dataclasses.replace(source, data_dir=str(folder), test_data=None, labels=labels)
    client_records = sources.load(client_source, need_test=False).train
    if corpus.test is not None:
        records.refuse_copy([client_records], records.columns_of(corpus.test))
    return client_records
