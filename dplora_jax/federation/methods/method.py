"""What a way of putting uploads together is: a record of facts and pure functions.

A configuration is checked without JAX, so the functions of a method import it themselves.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple


class Refusal(NamedTuple):
    """A field of the configuration that a method leaves at `usual`, and why (half a sentence)."""

    field: str
    usual: Any
    reason: str


# Of all but FedAvg, which take A and B apart.
FACTORS = (
    Refusal("head_only", False, "it averages LoRA matrices"),
    Refusal("freeze_a", False, "with A frozen the mean of B is exact already"),
    Refusal("core", False, "the mean of cores is exact already"),
)
ONE_RANK = (Refusal("ranks", None, "its halves have one rank"),)
# Of those that take the mean product as it is.
MEAN_PRODUCT = tuple(
    Refusal(field, usual, reason)
    for field, usual, reason in (
        ("server_lr", 1.0, "the mean product is taken as it is"),
        ("lr_decay", 1.0, "the mean product is taken as it is"),
        ("ema", 0.0, "factors of several rounds do not average to their products' mean"),
        ("robust", "none", "a robust mean would replace the mean that it needs"),
    )
)
FOLDED = tuple(
    Refusal(field, usual, "it would round away what is folded into the base")
    for field, usual in (("quantize", None), ("dtype", "float32"))
)


def _means(whole, adapters, bits, may_miss):
    """Bytes in a round in which the means travel back."""
    from dplora_jax.federation import compression

    return [compression.size(tree, bits) for tree in adapters], [compression.size(tree) for tree in adapters]


@dataclasses.dataclass(frozen=True)
class Method:
    """`name` is the flag's, `words` say in the report what happens, and `refuses` what it cannot be combined with. With
    `settled`, the server takes the factors as they come, and its momentum or moments are the head's alone: an exact mean would be
    undone by a step of another length. With `personal`, every client keeps a part of the adapter to itself.

    In the order of a round, for trees like the adapter:
    - `residual(adapter)`: the change {target: [L, I, O]} folded into the base before round 1, () where the method makes none;
      `shift(model, params, residual)`: the base with it.
    - `train(run, number)`: what the clients' local steps come to, by `run(split)`, where `split(params, adapter)` moves into
      the base what is not trained; `number` counts the rounds before this one.
    - `own(adapter)`: what each client keeps to itself before round 1; `begin(adapter, own)`: the adapter that it starts from;
      `keep(own, change)`: what it keeps after its steps; `send(upload)`: what of them travels.
    - `terms(client, start, done)`: the tree that is averaged over clients by their weights, of a `Client`, the adapter that the
      round began with, and a `waves.Trained`.
    - `settle(mean of terms, adapter, residual, number)`: the mean upload and the next residual.
    `ranked(method, rank)` is the method for clients of several ranks up to `rank`. `transfers(whole, adapters, bits, may_miss)`
    says the bytes (up, down) of each client in a round, of shapes: the whole adapter, each client's own, the bits of an upload's
    number, and whether clients may have missed rounds.
    """

    name: str
    words: str
    refuses: tuple = ()
    settled: bool = False
    personal: bool = False
    residual: Callable = lambda adapter: ()
    shift: Callable = lambda model, params, residual: params
    train: Callable = lambda run, number: run(lambda params, adapter: (params, adapter))
    own: Callable = lambda adapter: ()
    begin: Callable = lambda adapter, own: adapter
    keep: Callable = lambda own, change: own
    send: Callable = lambda upload: upload
    terms: Callable = lambda client, start, done: done.upload
    settle: Callable = lambda mean, adapter, residual, number: (mean, residual)
    ranked: Callable = lambda method, rank: method
    transfers: Callable = _means
