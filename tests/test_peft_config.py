"""Ranks, scales and modules are those that PEFT 0.21 gives for the same adapter_config.json."""

import pathlib

import pytest

from dplora_jax.errors import InputError
from dplora_jax.peft_config import PeftConfig

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query"]}
BERT, LLAMA = "bert.encoder.layer.{}.", "model.layers.{}."


def read(**options):
    return PeftConfig(pathlib.Path("adapter"), PLAIN | options, ("classifier",))


# PEFT's own `r` and `scaling` of the wrapped modules.
SCALES = [
    ({}, BERT + "attention.self.query", (0,), (4, 2.0)),
    ({"use_rslora": True}, LLAMA + "self_attn.q_proj", (0,), (4, 4.0)),
    ({"rank_pattern": {"layers.0.self_attn.v_proj": 2}}, LLAMA + "self_attn.v_proj", (0,), (2, 4.0)),
    ({"rank_pattern": {"layers.0.self_attn.v_proj": 2}}, LLAMA + "self_attn.v_proj", (1, 2), (4, 2.0)),
    ({"rank_pattern": {"model.layers.2.self_attn.q_proj": 8}}, LLAMA + "self_attn.q_proj", (2,), (8, 1.0)),
    ({"alpha_pattern": {"1.attention.self.query": 24}}, BERT + "attention.self.query", (1,), (4, 6.0)),
    ({"alpha_pattern": {"1.attention.self.query": 24}}, BERT + "attention.self.query", (0, 2), (4, 2.0)),
    ({"alpha_pattern": {r"\d+\.output\.dense": 3, "^bert.*output.dense": 5}}, BERT + "output.dense", (1,), (4, 0.75)),
    ({"alpha_pattern": {r"\d+\.output\.dense": 3, "^bert.*output.dense": 5}}, BERT + "attention.output.dense", (1,), (4, 1.25)),
    ({"alpha_pattern": {"uery": 5}}, BERT + "attention.self.query", (0,), (4, 2.0)),  # a whole part of the name, or none
    ({"use_rslora": True, "rank_pattern": {"v_proj": 2}}, LLAMA + "self_attn.v_proj", (0, 1), (2, 5.65685424949238)),
    ({"use_rslora": True, "alpha_pattern": {"down_proj": 1}}, LLAMA + "mlp.down_proj", (0, 1), (4, 0.5)),
]  # fmt: skip


@pytest.mark.parametrize(("options", "module", "layers", "expected"), SCALES)
def test_rank_and_scale_are_pefts(options, module, layers, expected):
    for layer in layers:
        rank, scale = read(**options).module_scaling(module.format(layer))
        assert (rank, round(scale, 12)) == (expected[0], round(expected[1], 12))


ADAPTED = [
    ({"target_modules": ["query", "value"], "layers_to_transform": [0, 2]}, BERT + "attention.self.query", (0, 2)),
    ({"target_modules": ["q_proj"], "layers_to_transform": 0}, LLAMA + "self_attn.q_proj", (0,)),
    ({"target_modules": ["q_proj"], "layers_to_transform": []}, LLAMA + "self_attn.q_proj", (0, 1, 2)),
    ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, LLAMA + "self_attn.q_proj", (1,)),
    ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h"]}, LLAMA + "self_attn.q_proj", ()),
    ({"target_modules": ["pooler.dense"], "layers_to_transform": [0]}, "bert.pooler.dense", ()),
    ({"target_modules": "all-linear"}, "bert.pooler.dense", (0,)),
    ({"target_modules": "all-linear", "exclude_modules": ["o_proj"]}, LLAMA + "self_attn.o_proj", ()),
    ({"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"}, LLAMA + "self_attn.o_proj", (1, 2)),
    ({"target_modules": r"model\.layers\.[01]\.self_attn\.q_proj"}, LLAMA + "self_attn.q_proj", (0, 1)),
    ({"target_modules": ["dense"]}, BERT + "output.dense", (0, 1, 2)),
    ({"target_modules": ["ense"]}, BERT + "output.dense", ()),
]  # fmt: skip


@pytest.mark.parametrize(("options", "module", "layers"), ADAPTED)
def test_the_adapted_modules_are_pefts(options, module, layers):
    count = 3 if "{}" in module else 1
    assert tuple(i for i in range(count) if read(**options).adapts(module.format(i))) == layers


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "mica"),
        ("loftq_config", {"loftq_bits": 4}),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("trainable_token_indices", [5]),
        ("kasa_config", {"beta": 1.0}),
        ("monteclora_config", {}),
        ("an_option_of_a_later_version", True),
        ("modules_to_save", ["classifier", "pooler"]),
        ("modules_to_save", "classifier"),
        ("r", 0),
        ("r", None),
        ("r", True),
        ("lora_alpha", None),
        ("lora_alpha", "8"),
        ("rank_pattern", {"query": 0}),
        ("rank_pattern", ["query"]),
        ("alpha_pattern", {"query": None}),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(option, value):
    with pytest.raises(InputError, match=option):
        read(**{option: value})


def test_options_that_change_no_value_are_read_over():
    read(
        fan_in_fan_out=True,
        lora_dropout=0.1,
        use_dora=False,
        an_option_of_a_later_version=None,
        another={},
        third=False,
    )


def test_a_broken_pattern_is_named():
    with pytest.raises(InputError, match=r"'\(' in adapter_config\.json is not a regular expression"):
        read(target_modules="(").adapts("query")
