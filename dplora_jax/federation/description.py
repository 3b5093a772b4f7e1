"""What config.json and the report say of a run beyond its fields."""

import dataclasses

import jax

from dplora_jax import lora
from dplora_jax.federation import aggregation_words, participation, round_bytes, trust
from dplora_jax.privacy import accounting


def describe(config, sizes, mechanisms, model, adapter, grid, noise, apart=False):
    """What config.json and the report say of a run beyond its fields; all of it public. `noise` is the rounds' own
    (`noise.Noise`). `apart` says that each party runs its own part on its own machine."""
    trust_mode = trust.mode(config)
    steps = participation.steps(config).sum(0).tolist()
    sent, full = lora.count(adapter), lora.count(jax.eval_shape(model.init, jax.random.key(0)))
    spent = [accounting.epsilon(m, count, config.privacy.delta) for m, count in zip(mechanisms, steps, strict=True)]
    up, down = round_bytes.by_client(config, adapter)
    weights = trust_mode.weights(config, sizes, mechanisms)
    clients = [  # `sampled_from` is the mechanism's own records: with null ones, or in mode `client` the clients
        {"client": k, **dataclasses.asdict(m), "records": n, "sampled_from": m.records, "epsilon": e, "weight": w}
        for k, (m, n, e, w) in enumerate(zip(mechanisms, sizes, spent, weights, strict=True))
    ]
    per_round = trust_mode.steps_per_round(config)
    for row, client_steps, bytes_up, bytes_down in zip(clients, steps, up, down, strict=True):
        row |= {"rounds": client_steps // per_round, "bytes_up": bytes_up, "bytes_down": bytes_down}
    mean_up, mean_down = (sum(values) / len(values) for values in (up, down))
    return {
        "clients": clients,
        "trust": list(trust_mode.statements(config, apart)),
        "release": release(config),
        "communication": {
            "adapter_parameters": sent,
            "full_parameters": full,
            "bytes_up_per_client_per_round": mean_up,
            "bytes_down_per_client_per_round": mean_down,
            "full_bytes_per_client_per_round": 4 * full,
            "ratio": 4 * full / mean_up,
        },
        "method": _method(config, noise, apart),
        "environment": {
            "jax": jax.__version__,
            "devices": f"{grid.devices.size} x {grid.devices.flat[0].device_kind}",
            "mesh": "x".join(map(str, grid.devices.shape)),
        },
        "apart": apart,
        "accounting": trust_mode.accounting(config, mechanisms, max(steps)),
    }


def _method(config, noise, apart):
    """How the run trains, in words."""
    method = [
        *trust.mode(config).method(config, apart),
        *(aggregation_words.lines(config) if trust.mode(config).public_uploads else ()),
        "head alone, no LoRA"
        if config.lora.head_only
        else f"LoRA rank {config.lora.rank} on {','.join(config.lora.targets)}"
        + (", A frozen (FFA-LoRA)" if config.lora.freeze_a else "")
        + (", a core alone between a frozen A and B (LoRA-XS)" if config.lora.core else ""),
    ]
    method += noise.words()
    return method + (
        [f"average of released adapters, decay {config.aggregation.ema:g}"] if config.aggregation.ema else []
    )


def release(config):
    """Whether the outputs may leave the house; None where there is no privacy."""
    if not trust.mode(config).private:
        return None
    return "for release" if config.privacy.seed is None else "NOT FOR RELEASE: a seed makes the noise reproducible"
