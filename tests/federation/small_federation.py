"""A federation of three clients of a tiny classifier, for tests of the objects: nothing is read from files."""

import functools

import jax
import numpy as np

from dplora_jax import losses
from dplora_jax.config import FederationConfig, replace
from dplora_jax.federation.federation import Federation
from dplora_jax.models import bert

SIZES = [20, 28, 12]
FIELDS = {
    "clients": 3, "rounds": 4, "local_steps": 1, "expected_batch_size": 8.0, "rank": 2, "targets": ("q", "v"), "epsilon": 8.0,
    "delta": 1e-3, "client_lr": 0.5, "head_lr": 1.0, "server_momentum": 0.5, "ema": 0.5, "eval_every": 2, "dispatch_rounds": 2,
    "seed": 3, "mesh": "1x1",
}  # fmt: skip


@functools.cache
def model():
    """(model, params): a random one-layer BERT classifier of three labels."""
    made = bert.Bert(bert.BertConfig(20, 8, 1, 2, 16, 8, 2, num_labels=3, pooling="mean"))
    return made, jax.tree.map(lambda p: 4 * p, jax.jit(made.init)(jax.random.key(0)))


def config(**fields):
    return replace(FederationConfig(), **(FIELDS | fields))


def rows(count, seed):
    """`count` records of random tokens, labelled by their first one."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 20, (count, 6), np.int32)
    return {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": tokens[:, 0] % 3}


def shards():
    return [rows(size, seed) for seed, size in enumerate(SIZES)]


def test_rows():
    return rows(30, 99)


test_rows.__test__ = False


def federation(**fields):
    return Federation(*model(), losses.classification, config(**fields))
