"""The shapes of models that a plan is asked for by name: what their published config.json say, and no weights."""

import contextlib
import dataclasses
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dplora_jax.errors import InputError
from dplora_jax.files import find, read_json
from dplora_jax.models import pretrained, quantized, registry
from dplora_jax.models.safetensors_file import SafetensorsCheckpoint, weight_files


def _llama(width, layers, heads, kv_heads, mlp_width, vocabulary=32000, positions=4096, **more):
    return {
        "model_type": "llama", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": mlp_width, "vocab_size": vocabulary,
        "max_position_embeddings": positions, "rms_norm_eps": 1e-5,
    } | more  # fmt: skip


KNOWN = {
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
    },
    "bert-base": {
        "model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2,
    },
    "llama2-7b": _llama(4096, 32, 32, 32, 11008),
    "llama2-13b": _llama(5120, 40, 40, 40, 13824),
    "llama2-70b": _llama(8192, 80, 64, 8, 28672),
    "llama3-8b": _llama(4096, 32, 32, 8, 14336, 128256, 8192, rope_theta=500000.0),
    "smollm2-135m": _llama(576, 30, 9, 3, 1536, 49152, 8192, rope_theta=100000, tie_word_embeddings=True),
    "chatglm-6b": {
        "model_type": "chatglm", "vocab_size": 130528, "hidden_size": 4096, "num_layers": 28, "num_attention_heads": 32,
        "inner_hidden_size": 16384, "max_sequence_length": 2048, "bos_token_id": 130004, "gmask_token_id": 130001,
        "mask_token_id": 130000, "position_encoding_2d": True,
    },
}  # fmt: skip


class NoWeights(NamedTuple):
    """Stands for a checkpoint of which only config.json is known: it is taken to hold all that its model could have, but no
    matrix that the published code shares with another (ChatGLM-6B's output)."""

    directory: pathlib.Path

    def has(self, name):
        """Whether there is such a tensor: a pooler counts."""
        return name != "lm_head.weight"


def build(base, classes, layers=None):
    """The model of `base` (a `config.Base`), whose name is one in KNOWN or a directory with config.json, and the shapes of its
    parameters as it has them (dtype, quantisation, remat) -> (model, params of jax.ShapeDtypeStruct). `classes` None: a language
    model. `layers` is how many layers it has, where not as many as it says.

    Raises InputError on a name that is neither, and where the model is not supported.
    """
    if base.name in KNOWN:
        hf, place = KNOWN[base.name], pathlib.Path(base.name)
    else:
        place = pathlib.Path(base.name).expanduser()
        if not (place / "config.json").is_file():
            raise InputError(
                f"--model={base.name} is neither a directory with config.json nor one of {', '.join(KNOWN)}."
            )
        hf = pretrained.config(place)
    if layers is not None:
        hf = hf | {name: layers for name in pretrained.DEPTH if name in hf}
    there = place.is_dir() and bool(weight_files(place))  # then it is looked up which tensors there are
    with SafetensorsCheckpoint(place) if there else contextlib.nullcontext(NoWeights(place)) as checkpoint:
        model = pretrained.build(hf, checkpoint, classes, jnp.dtype(base.dtype))
    if base.remat:
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=True))
    params = jax.eval_shape(model.init, jax.random.key(0))
    if base.quantize:
        params = jax.eval_shape(functools.partial(quantized.quantize, model=model, kind=base.quantize), params)
    return model, params


def default_task(name):
    """What a plan trains unless told: the labels of a masked language model, the next tokens of all others."""
    place = pathlib.Path(name).expanduser()
    hf = KNOWN.get(str(name)) or (read_json(place / "config.json") if find(place, "config.json") else {})
    return "classification" if registry.bidirectional(hf.get("model_type")) else "language_model"
