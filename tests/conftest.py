"""Shared fixtures: eight virtual devices, and a tiny BERT with a tokenizer of its own, written as a checkpoint."""

import os

from tests import compilation

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {compilation.FLAGS}"
)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["JAX_PLATFORMS"] = "cpu"

import json
import logging
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

from dplora_jax.models import bert

GOLDEN = pathlib.Path(__file__).parent / "golden"
WORDS = [
    *(
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "profit",
        "cost",
        "sales",
        "loss",
        "rose",
        "fell",
        "grew",
        "shrank",
    ),
    *("sharply", "again", "today", "firm", "bank", "north", "south"),
]
TINY = {
    "model_type": "bert", "architectures": ["BertModel"], "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16, "type_vocab_size": 2,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12,
}  # fmt: skip


COMPILED = pytest.StashKey[str]()


def pytest_configure(config):
    """Compile a program once a process, however many runs trace it anew: from a cache that no other process reads or writes."""
    config.stash[COMPILED] = tempfile.mkdtemp(prefix="dplora_jax_compiled_")
    jax.config.update("jax_compilation_cache_dir", config.stash[COMPILED])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure(config):
    shutil.rmtree(config.stash[COMPILED])


@pytest.fixture(autouse=True)
def unguarded():
    """What a command switches off for the rest of its process (`guard.begin`) is on again for the next test."""
    before = (
        logging.root.manager.disable,
        warnings.showwarning,
        sys.excepthook,
        threading.excepthook,
        sys.unraisablehook,
    )
    terminated = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, terminated)
    logging.disable(before[0])
    warnings.showwarning, sys.excepthook, threading.excepthook, sys.unraisablehook = before[1:]


@pytest.fixture
def golden():
    """The directory of reference values."""
    return GOLDEN


@pytest.fixture(scope="module")
def quick_compile():
    """Half the compile time, for modules whose tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def full_compile():
    """What a run's own compilation does, for a test of the memory that it leaves."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def mostly_slow(fast, every):
    """The values of `every` as pytest.param's, marked slow unless they are in `fast`: few stand for what all share."""
    return [value if value in fast else pytest.param(*_as_tuple(value), marks=pytest.mark.slow) for value in every]


def _as_tuple(value):
    return value if type(value) is tuple else (value,)  # a named tuple is one value


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A directory with a random two-layer BERT (mean pooling: it has no pooler) and a word-level tokenizer."""
    return write_bert(tmp_path_factory.mktemp("tiny_bert"))


def write_bert(directory):
    """Write the checkpoint that `tiny_bert` speaks of -> the directory."""
    model = bert.Bert(bert.from_config(TINY, 3, "mean", False))
    params = jax.tree.map(lambda p: 4 * np.asarray(p), model.init(jax.random.key(0)))
    tensors = {}
    for weight in model.weights():
        value = params
        for key in weight.path:
            value = value[key]
        if weight.path[0] == "head":
            continue
        rows = enumerate(value) if "{}" in weight.name else [(0, value)]
        for layer, row in rows:
            tensors[weight.tensor.format(layer)] = np.ascontiguousarray(row.T if weight.part == "kernel" else row)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(TINY))
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory):
    """A tokenizer.json that knows WORDS, as transformers' fast BERT tokenizer reads it."""
    import tokenizers

    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **special}))


@pytest.fixture(scope="session")
def finance_table(tmp_path_factory):
    """A directory with train.csv (60 rows) and test.csv (30 rows) of text, label and bank, in the tiny tokenizer's words."""
    return write_table(tmp_path_factory.mktemp("finance_table"))


def write_table(directory):
    """Write the tables that `finance_table` speaks of -> the directory."""
    rng = np.random.default_rng(0)
    label = {("profit", "rose"): "good", ("profit", "fell"): "bad", ("cost", "rose"): "bad", ("cost", "fell"): "good"}
    for name, count in (("train", 60), ("test", 30)):
        rows = ["text,label,bank"]
        for index in range(count):
            noun, verb = ("profit", "cost")[rng.integers(2)], ("rose", "fell")[rng.integers(2)]
            rows.append(
                f"{noun} {verb} {WORDS[rng.integers(13, 20)]},{label[noun, verb]},{('north', 'south', 'east')[index % 3]}"
            )
        (directory / f"{name}.csv").write_text("\n".join(rows) + "\n")
    return directory
