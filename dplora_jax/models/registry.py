"""The model families by the `model_type` of config.json: a family is one module, which ends in its FAMILY, and one line here."""

from dplora_jax.errors import InputError
from dplora_jax.models import (
    bert,
    chatglm,
    distilbert,
    gemma,
    gpt2,
    gpt_neox,
    llama,
    modernbert,
    olmo2,
    phi3,
    qwen3,
    roberta,
)

MODULES = (bert, roberta, distilbert, modernbert, gpt2, gpt_neox, llama, qwen3, gemma, phi3, olmo2, chatglm)
FAMILIES = {kind: module.FAMILY for module in MODULES for kind in module.FAMILY.classes}
ARCHITECTURES = {name: gguf for module in MODULES for name, gguf in module.FAMILY.gguf.items()}  # llama.cpp's
GGUF = {name: gguf for name, gguf in ARCHITECTURES.items() if not gguf.adapters_only}  # of the models that are read
# What the config.json of a mixture of experts calls their number.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


def bidirectional(model_type):
    """Whether tokens see those that follow them in models of that `model_type`."""
    return model_type in FAMILIES and FAMILIES[model_type].bidirectional


def architecture(model_type):
    """llama.cpp's name of a `model_type`'s architecture; None where it has none that adapters can be written for."""
    family = FAMILIES.get(model_type)
    name = family and family.gguf_names.get(model_type, model_type)
    return name if name in ARCHITECTURES else None


def refuse_experts(hf):
    """Raise InputError where config.json `hf` is of a mixture of experts: a router's load balancing and its experts' capacities
    are a batch's own, so that one row would change what another's gradient is."""
    for name in EXPERTS:
        if hf.get(name) not in (None, 0, 1):
            raise InputError(
                f"config.json: a mixture of experts ({hf.get('model_type')}, {name}) is not supported: its router "
                "weighs the rows of a batch against each other, and no row may change another's gradient."
            )
