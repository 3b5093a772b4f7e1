"""What an earlier start in a working directory allows a later one to change."""

import shutil

from dplora_jax.config import RESULT, deciding, to_flat
from dplora_jax.errors import InputError
from dplora_jax.federation import workdir_files
from dplora_jax.files import plain


def stored_config(folder, config):
    """The config.json of an earlier start here -> Stored, or None; InputError where fields that enter the training differ."""
    if not (folder / "config.json").exists():
        return None
    stored = workdir_files.read_config(folder)
    if names := differing(config, stored.document):
        raise InputError(
            f"{folder} belongs to a run with another {names}: set them as they were, or give another `workdir`."
        )
    return stored


def differing(config, document):
    """The fields, in words, that decide the result and are others in `config` than in `document`, what a config.json says."""
    now, began = plain(to_flat(config)), workdir_files.with_defaults(document)
    # How often a run is evaluated decides the noise of scores on records that are kept back.
    deciders = [*deciding(RESULT), *(["eval_every"] if now["private_test"] else [])]
    return ", ".join(f"`{name}`" for name in deciders if name in now and now[name] != began[name])


def charged_config(folder, stored, ledger):
    """The JSON object of `stored` where its run was charged already, by it and no other; else None: all that it says is then made
    anew, from the configuration and records. What an earlier start saved by it before the first round goes."""
    charged = ledger.charged
    if charged and stored is None:
        raise InputError(
            f"{folder}/config.json is gone, and rounds were charged by it: restore it, or start a new `workdir`."
        )
    if charged and charged[-1].get("config", stored.digest) != stored.digest:
        raise InputError(
            f"{folder}/config.json is not the one that the ledger was charged by: restore it, or start a new `workdir`."
        )
    if charged or ledger.ended:
        return stored and stored.document
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return None
