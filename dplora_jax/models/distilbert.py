"""DistilBERT (Sanh et al. 2019): BERT's layers without segments, under names of their own."""

import dataclasses
from typing import ClassVar

import jax

from dplora_jax.errors import InputError
from dplora_jax.models import encoder
from dplora_jax.models.bert import Bert, BertConfig
from dplora_jax.models.family import Family, activation, refuse_unsupported, sizes


@dataclasses.dataclass(frozen=True)
class DistilBert(Bert):
    """The model as pure functions of its parameters; see Encoder. A classifier's `pre_classifier` stands in the pooler's place,
    and is frozen like it; a PEFT adapter that brings a trained one has it in its head."""

    base: ClassVar = "distilbert"
    layer: ClassVar = "transformer.layer.{}"
    modules: ClassVar = {
        "query": "attention.q_lin", "key": "attention.k_lin", "value": "attention.v_lin", "output": "attention.out_lin",
        "up": "ffn.lin1", "down": "ffn.lin2", "attention_norm": "sa_layer_norm", "mlp_norm": "output_layer_norm",
    }  # fmt: skip
    embeddings: ClassVar = {"word": "word", "position": "position"}
    pooler_module: ClassVar = "pre_classifier"
    pooler_activation: ClassVar = staticmethod(jax.nn.relu)
    head_dense: ClassVar = "pre_classifier"
    head_output: ClassVar = "classifier"
    transform_modules: ClassVar = {"dense": "vocab_transform", "norm": "vocab_layer_norm"}
    mlm_bias: ClassVar = "vocab_projector"
    ties: ClassVar = {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"}
    carried: ClassVar = ()
    idle: ClassVar = r"(vocab_transform|vocab_layer_norm|vocab_projector|pre_classifier)\..+"


def from_config(hf, num_labels, pooling, normalize):
    """BertConfig without segments from Hugging Face's `config.json` (a dict); refuses by name what is not implemented."""
    refuse_unsupported(hf, {"tie_word_embeddings": (True,)})
    vocab_size, width, num_layers, num_heads, mlp_width, max_positions = sizes(
        hf, "vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "max_position_embeddings"
    )
    if width % num_heads:
        raise InputError(f"config.json: dim={width} is not a multiple of n_heads={num_heads}.")
    return BertConfig(
        vocab_size, width, num_layers, num_heads, mlp_width, max_positions, 0, activation(hf, "activation", "gelu"),
        num_labels=num_labels, pooling=pooling, normalize=normalize,
    )  # fmt: skip


def build(hf, checkpoint, num_labels, dtype):
    """The DistilBert that config.json `hf` describes."""
    how = encoder.pooling(hf, checkpoint, DistilBert.pooler_module, DistilBert.head_output)
    return DistilBert(from_config(hf, num_labels, *how), dtype)


FAMILY = Family(
    {"distilbert": ("DistilBertForMaskedLM", "DistilBertForSequenceClassification")},
    build,
    bare={"distilbert": "DistilBertModel"},
    bidirectional=True,
)
