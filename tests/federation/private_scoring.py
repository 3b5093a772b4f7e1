"""Small federations that keep records back, for the tests of their scores."""

import jax
import numpy as np

from dplora_jax import losses
from dplora_jax.federation import held_out, storage
from dplora_jax.federation.federation import Federation
from dplora_jax.privacy import secrets
from dplora_jax.privacy.ledger import Ledger
from tests.federation import small_federation as small

KEYS = secrets.from_seed(3, 3)


def maker():
    """A function (fields) -> Federation that keeps a quarter back; those of one maker share their compiled rounds."""
    programs = {}

    def make(**fields):
        config = small.config(**({"private_test": 0.25} | fields))
        return Federation(*small.model(), losses.classification, config, programs=programs)

    return make


def run(made, shards=None, workdir=None, **options):
    return list(made.fit(shards or small.shards(), workdir or storage.InMemory(), **options))


def kept(made):
    return held_out.split(made.config, small.shards(), KEYS)[1]


def changed(made, places_of):
    """The shards with the records at `places_of(client)` labelled and worded otherwise."""
    shards = small.shards()
    for client, shard in enumerate(shards):
        places = places_of(client)
        shard["labels"][places] = (shard["labels"][places] + 1) % 3
        shard["input_ids"][places] = (shard["input_ids"][places] + 7) % 20
    return shards


def same(one, other):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def entries(workdir):
    return Ledger(workdir / "privacy_ledger.jsonl", mend=False)


def run_lazily(made, shards=None):
    return made.fit(shards or small.shards(), storage.InMemory())
