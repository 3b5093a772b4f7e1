"""Bases with adapters whose exports PyTorch has been shown: each case is made again from the reference values alone."""

import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import safetensors.numpy

from dplora_jax import lora, models, peft
from tests.conftest import GOLDEN, write_tokenizer

ALL = lora.LoraConfig(3, 6, ("all-linear",))
# name: (base, adapter), both below GOLDEN; of an adapter that is drawn here, its seed, rank, alpha and targets.
CASES = {
    "gpt2": ("peft_gpt2_all/base", "peft_gpt2_all/adapter"),
    "gpt2_untied": ("variants/gpt2_untied", (1, ALL)),
    "gpt2_classifier": ("variants/gpt2_classifier", (2, lora.LoraConfig(2, 4, ("q", "down")))),
    "llama": ("peft_llama_all/base", "peft_llama_all/adapter"),
    "llama_classifier": ("peft_llama_seqcls/base", "peft_llama_seqcls/adapter"),
    "qwen2": ("variants/qwen2", (3, lora.LoraConfig(2, 5, ("q", "k", "down"), last_layers=1))),
    "mistral": ("variants/mistral_window", (4, ALL)),
    "bert_pooler": ("bert_tiny_classifier", "peft_bert_tiny/adapter"),
    "bert_mean": ("bert_tiny_classifier", (5, ALL)),
    "bert_mean_normalized": ("bert_tiny_classifier", (6, lora.LoraConfig(2, 4, ("q", "v")))),
}
TEXTS = ["profit rose sharply", "cost fell again today", "the bank", "sales shrank north south loss grew firm cost"]


def base_of(name, directory):
    """The base of a case: its directory; of a mean-pooled one a copy that says so, with a tokenizer of twenty words."""
    source = GOLDEN / CASES[name][0]
    if not name.startswith("bert_mean"):
        return source
    shutil.copytree(source, directory)
    write_tokenizer(directory)
    kinds = {"Transformer": "", "Pooling": "1_Pooling"} | ({"Normalize": "2_Normalize"} if "normal" in name else {})
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds.items()]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    said = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(said | {"architectures": ["BertModel"]}))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9, "do_lower_case": False}))
    return directory


def adapter_of(name, base, directory):
    """The directory of a case's adapter: the reference values' own, or drawn from its seed and written."""
    if isinstance(CASES[name][1], str):
        return GOLDEN / CASES[name][1]
    seed, config = CASES[name][1]
    model, params = models.from_pretrained(base, num_labels=3 if name.startswith("bert_mean") else None)
    adapter = draw(seed, model, params, config)
    peft.save(directory, model, adapter, config)
    return directory


def draw(seed, model, params, config):
    """An adapter with every leaf 0.2 times a normal, in the order of the tree's leaves."""
    rng = np.random.default_rng(seed)
    shapes = lora.init(jax.random.key(0), model, params, config)
    return jax.tree.map(lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)


def inputs_of(name):
    """What a case's logits are for: the reference inputs of its base, or TEXTS for those that serve texts."""
    if name.startswith("bert_mean"):
        return {}
    folder = GOLDEN / CASES[name][0]
    folder = folder if (folder / "golden.npz").exists() else folder.parent
    with np.load(folder / "golden.npz") as file:
        return {key: file[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in file}


def listing(directory, base):
    """Every exported tensor as "file name shape hash", sorted; the hash only of those that are the base's own, bit for bit:
    what is computed may differ in its last bit from machine to machine."""
    directory, own = pathlib.Path(directory), {}
    for path in pathlib.Path(base).glob("model*.safetensors"):
        own |= safetensors.numpy.load_file(path)
    lines = []
    for path in sorted(directory.rglob("*.safetensors")):
        for name, value in safetensors.numpy.load_file(path).items():
            source = own.get(name, own.get(f"bert.{name}"))
            same = source is not None and source.dtype == value.dtype and np.array_equal(source, value)
            digest = hashlib.sha256(value.tobytes()).hexdigest() if same else "computed"
            shape = "x".join(map(str, value.shape))
            lines.append(f"{path.relative_to(directory)} {name} {shape} {value.dtype} {digest}")
    return sorted(lines)
