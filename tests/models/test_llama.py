"""Rotary frequencies are transformers', whichever of its two spellings of the options a config.json has, or both."""

import numpy as np
import pytest

from dplora_jax.errors import InputError
from dplora_jax.models import rope

DEFAULT = {"rope_type": "default", "rope_theta": 500.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Heads of width 8 and 64 positions; the frequencies are those of transformers 5.24's LlamaRotaryEmbedding.
CASES = [
    ({"rope_parameters": DEFAULT, "rope_scaling": LINEAR}, [0.25, 0.025, 0.0025, 0.00025]),  # theta is the default again
    ({"rope_parameters": DEFAULT, "rope_theta": 700.0}, [1.0, 0.211474, 0.044721, 0.009457]),
    ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 700.0}, [1.0, 0.194413, 0.037796, 0.007348]),
    ({"rope_scaling": LINEAR | {"rope_theta": 300.0, "factor": 2.0}, "rope_theta": 700.0}, [0.5, 0.120141, 0.028868, 0.006936]),
    ({"rope_parameters": LINEAR, "rope_scaling": {}}, [0.25, 0.025, 0.0025, 0.00025]),
    ({"rope_parameters": LINEAR, "rope_scaling": None}, [0.25, 0.025, 0.0025, 0.00025]),
    ({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}, [1.0, 0.1, 0.01, 0.001]),
    ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}}, [1.0, 0.0125, 0.00125, 0.000125]),
    (
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}, "original_max_position_embeddings": 16},
        [0.576056, 0.0125, 0.00125, 0.000125],
    ),
    ({"rope_scaling": LLAMA3}, [1.0, 0.013042, 0.00125, 0.000125]),  # all 64 positions
]  # fmt: skip


@pytest.mark.parametrize(("config", "expected"), CASES)
def test_of_two_spellings_the_one_that_transformers_obeys_counts(config, expected):
    found = rope.read({"max_position_embeddings": 64} | config, 8).frequencies
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_options_by_kind_of_layer_are_refused(name):
    with pytest.raises(InputError, match="one set of options for all layers"):
        rope.read({name: {"full_attention": LINEAR}}, 8)


def test_a_scaling_that_is_not_read_is_refused_though_plain_parameters_stand_beside_it():
    with pytest.raises(InputError, match="rope_type='foo'"):
        rope.read({"rope_parameters": DEFAULT, "rope_scaling": {"rope_type": "foo", "factor": 2.0}}, 8)


@pytest.mark.parametrize(
    "options",
    [
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": float("nan")},
        {"rope_type": "yarn", "factor": float("inf")},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [float("nan")] * 4, "long_factor": [1.0] * 4},
    ],
)
def test_angles_that_are_not_finite_are_refused(options):
    with pytest.raises(InputError, match="not finite"):
        rope.read({"rope_parameters": options, "max_position_embeddings": 64}, 8)
