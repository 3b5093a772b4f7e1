"""FedSA-LoRA: A is shared, and every B stays at its client (Guo et al. 2024, section 4). Uploads hold A and the head."""

from dplora_jax.federation.methods.method import FACTORS, ONE_RANK, Method, Refusal


def _own(adapter):
    """Every {target: B} of the adapter."""
    return {name: pair.b for name, pair in adapter["layers"].items()}


def _with(adapter, own):
    """`adapter` with these B in place of its own."""
    return {**adapter, "layers": {name: pair.replace(b=own[name]) for name, pair in adapter["layers"].items()}}


def _keep(own, change):
    """A client's B after its steps: what does not travel is not rounded."""
    import jax

    return jax.tree.map(lambda b, step: b + step, own, _own(change))


def _send(upload):
    return {**upload, "layers": {name: pair.replace(b=None) for name, pair in upload["layers"].items()}}


def _terms(client, start, done):
    """The global B is the mean of the clients', which follow their own steps."""
    import jax

    return _with(done.upload, jax.tree.map(lambda b, mean: b - mean, done.own, _own(start)))


def _transfers(whole, adapters, bits, may_miss):
    from dplora_jax.federation import compression

    sent = [_send(tree) for tree in adapters]
    return [compression.size(tree, bits) for tree in sent], [compression.size(tree) for tree in sent]


METHOD = Method(
    "fedsa",
    "A averaged, weighted by n_k / n, every client's B kept to itself (FedSA-LoRA)",
    refuses=(
        *FACTORS,
        *ONE_RANK,
        Refusal("ema", 0.0, "an average over rounds has no client's own B"),
        Refusal("robust", "none", "a robust mean would replace the mean that it needs"),
    ),
    personal=True,
    own=_own,
    begin=_with,
    keep=_keep,
    send=_send,
    terms=_terms,
    transfers=_transfers,
)
