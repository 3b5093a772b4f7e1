"""What a run gives away in the end: the adapter that metrics and files speak of, whatever the aggregation makes of it.

Metrics use its head on features as the run prepares them (`models.features`); files hold that head for the base's features."""

from typing import Any, NamedTuple

import jax
import numpy as np

from dplora_jax import lora, peft
from dplora_jax.federation import exact, mesh, methods
from dplora_jax.models import features


def adapter(config, state):
    """The adapter of the released model: the average where there is one."""
    return state.average.mean if config.aggregation.ema else state.adapter


def personal(config, state):
    """Each client's own adapter in turn, where every client keeps its own B."""
    method = methods.BY_NAME[config.aggregation.method]
    for client in range(config.schedule.clients):
        yield method.begin(state.adapter, jax.tree.map(lambda x, k=client: x[k], state.own))


def metrics(config, sizes, evaluate, state):
    """The public metrics of `state` (a `round.State`), by `evaluate(adapter, residual)`; where every client keeps its own B, the
    mean over the clients' own models, by their shares of the mean, and each one's."""
    method = methods.BY_NAME[config.aggregation.method]
    if not method.personal:
        return evaluate(adapter(config, state), state.residual)
    each = [evaluate(model, ()) for model in personal(config, state)]
    shares = np.array(sizes) / sum(sizes)
    means = (
        {name: float(np.dot(shares, [client_metrics[name] for client_metrics in each])) for name in each[0]}
        if each[0]
        else {}
    )
    return means | {f"{name}_by_client": [client_metrics[name] for client_metrics in each] for name in each[0]}


class Released(NamedTuple):
    """What the files are made of, on the host: the adapter with every A, the change folded into the base, each client's own B."""

    adapter: Any
    residual: Any
    own: Any


def fetched(config, params, state):
    """The Released of `state`, its head on features as the base model makes them; where there are several processes, all must
    call it."""
    return Released(whole(params, adapter(config, state)), *mesh.fetch((state.residual, state.own)))


def whole(params, adapter):
    """`adapter` as files hold it, on the host: with every A, its head on features as the base model makes them."""
    held = mesh.fetch(lora.without_cores(lora.with_frozen(params, adapter)))
    measured = params.get(features.KEY, {})
    return held | {"head": features.outward(held["head"], mesh.fetch(measured))} if "center" in measured else held


def save(folder, config, model, lora_config, parts, base):
    """Write the adapter of the released model to the directory `folder` in PEFT's format, from `parts` (its Released); where
    every client keeps its own B, each client's beside it in `folder`/clients. `base` is the base model's name for others."""
    held = parts.adapter
    if len(parts.residual):  # a PEFT file has no place for what was folded into the base
        held, rank = exact.whole(held, parts.residual)
        lora_config = lora.LoraConfig(rank, float(rank), lora_config.targets, lora_config.last_layers)
    peft.save(folder, model, held, lora_config, base)
    method = methods.BY_NAME[config.aggregation.method]
    if method.personal:
        for client in range(config.schedule.clients):
            client_adapter = method.begin(held, jax.tree.map(lambda x, k=client: x[k], parts.own))
            peft.save(folder / "clients" / str(client), model, client_adapter, lora_config, base)
