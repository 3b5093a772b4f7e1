"""Bytes on the way, exactly, from shapes: what each client sends and gets in a round that it takes part in."""

import jax

from dplora_jax.federation import methods, participation


def by_client(config, adapter):
    """(bytes up, bytes down) of each client in a round, two lists of K; `adapter` is the one that is trained (shapes suffice).

    Down travels what a client lacks to begin the next round, in float32: as a rule the means, of several ranks its own
    components (`methods.Method.transfers`).
    """
    ranks = config.lora.ranks or [config.lora.rank] * config.schedule.clients
    shapes = jax.eval_shape(lambda tree: tree, adapter)
    adapters = [_cut(shapes, rank) for rank in ranks]
    method = methods.BY_NAME[config.aggregation.method]
    return method.transfers(shapes, adapters, config.aggregation.upload_bits, participation.partial(config))


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
