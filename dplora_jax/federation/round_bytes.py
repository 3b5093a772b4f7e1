"""Bytes on the way, exactly, from shapes: what each client sends and gets in a round that it takes part in."""

import jax

from dplora_jax import lora
from dplora_jax.federation import compression, exact, participants


def of_run(config, adapter):
    """(bytes up, bytes down) of each client in a round, two lists of K; `adapter` is the one that is trained (shapes suffice).

    Down travels what a client lacks to begin the next round, in float32: the means, of several ranks its own components. With
    `fedex` and `flora` it is all clients' factors, or the dense residual (and with `fedex` the factors' means), whichever is
    less; the residual, where a client may have missed rounds. FLoRA's fresh A is public, like the first one. With `rolora`
    both are means over the two halves' rounds.
    """
    ranks = config.lora.ranks or [config.lora.rank] * config.schedule.clients
    shapes = jax.eval_shape(lambda tree: tree, adapter)
    own = [_cut(shapes, rank) for rank in ranks]
    if config.aggregation.method == "rolora":
        halves = [[lora.freeze({}, tree, letter)[1] for letter in "ab"] for tree in own]
        up = [sum(compression.size(half, config.aggregation.upload_bits) for half in pair) / 2 for pair in halves]
        return up, [sum(map(compression.size, pair)) / 2 for pair in halves]
    if config.aggregation.method == "fedsa":
        own = [lora.freeze({}, tree, "b")[1] for tree in own]
    up, down = ([compression.size(tree, bits) for tree in own] for bits in (config.aggregation.upload_bits, None))
    head = compression.size({part: value for part, value in shapes.items() if part != "layers"})
    stack = sum(down) - head * (len(down) - 1)  # all clients' factors, and one head
    if config.aggregation.method in ("fedex", "flora"):
        dense = compression.size(jax.eval_shape(exact.product, shapes))
        dense += compression.size(shapes) if config.aggregation.method == "fedex" else head
        down = [dense if participants.partial(config) else min(stack, dense)] * len(down)
    return up, down


def _cut(shapes, rank):
    """The shapes of an adapter's first `rank` components."""
    if "layers" not in shapes:
        return shapes

    def pair(p):
        a = (
            None
            if p.a is None
            else jax.ShapeDtypeStruct((p.a.shape[0], min(rank, p.a.shape[1]), p.a.shape[2]), p.a.dtype)
        )
        b = None if p.b is None else jax.ShapeDtypeStruct((*p.b.shape[:2], min(rank, p.b.shape[2])), p.b.dtype)
        return p.replace(a=a, b=b)

    return {**shapes, "layers": {name: pair(p) for name, p in shapes["layers"].items()}}
