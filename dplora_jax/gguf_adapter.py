"""LoRA adapters as llama.cpp and Ollama read them: one GGUF file, to be given beside the base model's own.

The format is that of llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp (April 2025 and later): of each adapted matrix
`<tensor>.lora_a` [R, I] and `<tensor>.lora_b` [O, R], which llama.cpp adds as W + (alpha / R) B A; its own names of tensors, and
B's rows where it keeps W's.
"""

import math

import gguf
import numpy as np

from dplora_jax.errors import InputError
from dplora_jax.models import gguf_file, registry


def check(model, model_type):
    """Raise InputError where a GGUF adapter of such a model cannot be: of classifiers, and where llama.cpp has none."""
    if model.config.num_labels is not None:
        raise InputError(
            "a GGUF adapter has no place for a classification head: export it in PEFT's format, or merged."
        )
    if registry.architecture(model_type) is None:
        known = ", ".join(kind for kind in registry.FAMILIES if registry.architecture(kind))
        raise InputError(f"a GGUF adapter of model_type={model_type!r} cannot be written; known: {known}.")


def save(path, model, adapter, config, model_type, base=None, description=None):
    """Write `adapter` (every A present: see lora.with_frozen) of LoraConfig `config` as the GGUF file `path`, in float32.

    `model_type` is that of the base's config.json, `base` the hub's name of it, and `description` a line for people. Raises
    InputError as `check` does.
    """
    check(model, model_type)
    architecture = registry.architecture(model_type)
    alpha = config.alpha or config.rank  # to llama.cpp 0 means that nothing is scaled
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    if description:
        writer.add_description(description)
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.split("/")[-1])
        writer.add_base_model_organization(0, base.split("/")[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    for name, matrix in tensors(model, adapter, config, architecture, alpha).items():
        writer.add_tensor(name, matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(model, adapter, config, architecture, alpha):
    """{llama.cpp's name: float32 array}: A [R, I] and B [O, R] of every adapted matrix of each layer, for the scale
    `alpha` / R. A matrix with another scale has the ratio in its B."""
    names, c = registry.ARCHITECTURES[architecture], model.config
    first = c.num_layers - (config.last_layers or c.num_layers)
    out = {}
    for target, pair in adapter.get("layers", {}).items():
        ratio = pair.scale * config.rank / alpha
        for index, (a, b) in enumerate(zip(np.asarray(pair.a), np.asarray(pair.b), strict=True)):
            name = f"{model.targets[target].module.format(first + index)}.weight"
            order = names.order(name, len(b), c.num_heads, getattr(c, "num_kv_heads", c.num_heads))
            b = b if order is None else b[np.argsort(order)]
            stored = gguf_file.stored_name(names, name)
            out[f"{stored}.lora_a"] = np.ascontiguousarray(a, np.float32)
            scaled = b if math.isclose(ratio, 1.0, rel_tol=1e-12) else b * np.float32(ratio)
            out[f"{stored}.lora_b"] = np.ascontiguousarray(scaled, np.float32)
    return out
