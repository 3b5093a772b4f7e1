"""What each party of a federation between machines reads: a site its own table and the base model, the coordinator the base model
and the public test set."""

import types

from dplora_jax.data import records, sources
from dplora_jax.errors import InputError
from dplora_jax.federation import frozen_layers, mesh, program
from dplora_jax.finetuning import dealing, public_tests, setup, warm_start


def public(config, stored=None):
    """The `setup.Base` of a party's `config`, by the public test set and the labels alone. `stored` is as for `setup.prepare`.
    Raises InputError."""
    _check(config)
    source = dealing.source_of(config)
    corpus = sources.load_public(source, need_test=False)
    return setup.read_base(config, corpus, stored)


def own_records(config):
    """This party's records as they were read, from `data_dir`/train.*; no model. Raises InputError, also where the public test
    set holds them all."""
    _check(config)
    corpus = sources.load(dealing.source_of(config), need_test=False)
    if corpus.test is not None:  # `load` asked for the whole table, and this party may train on a few rows of it
        records.refuse_copy([corpus.train], records.columns_of(corpus.test))
    return corpus.train


def evaluator(config, base):
    """A function (adapter, ends) -> public metrics of a `setup.Base`, by its public test set; `adapter` is a pytree. Raises
    InputError where there is no test set."""
    grid = mesh.make("1x1", 1, base.model)
    params = mesh.put(base.params, mesh.base_sharding(grid, base.params))
    whole = types.SimpleNamespace(
        model=base.model, whole_model=base.model, params=params, mesh=grid, through_frozen_layers=lambda table: table
    )
    measure = public_tests.evaluator(config, base.objective, base.corpus, [], base.tokenizer, base.test, whole)
    return lambda adapter, ends: measure(adapter, (), ends=ends)


def trained_first(config, base, public):
    """The adapter before round 1, trained on the Records `public` (`warm_start.trained`), on the host. Raises InputError."""
    adapter, params, _ = program.adapter(config, base.model, base.params)
    grid = mesh.make("1x1", 1, base.model)
    model, through = frozen_layers.split(config, base.model, params, len(public.texts), config.data.max_length)
    whole = types.SimpleNamespace(
        model=model, whole_model=base.model, params=mesh.put(params, mesh.base_sharding(grid, params)), mesh=grid,
        adapter=adapter, through_frozen_layers=through,
    )  # fmt: skip
    return warm_start.trained(config, base.objective, public, None, whole)


def _check(config):
    if config.data.dataset not in sources.OWN_TABLES:
        raise InputError(
            f"dataset={config.data.dataset} is one table for all: parties that share no machine have their own, so give "
            f"{', '.join(sources.OWN_TABLES)}."
        )
