"""RoBERTa (Liu et al. 2019) and XLM-RoBERTa (Conneau et al. 2020): BERT's layers, with positions counted over a row's own tokens.

Letters: B rows, T tokens, D width.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from dplora_jax.errors import InputError
from dplora_jax.models import bert, encoder
from dplora_jax.models.bert import Bert, BertConfig, Transform
from dplora_jax.models.family import Family


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """Sizes and choices of one RoBERTa; `padding` is the id of padding, behind which positions begin."""

    padding: int = 1

    @property
    def position_rows(self):
        """Rows of the table of positions."""
        return self.max_positions + self.padding + 1


@dataclasses.dataclass(frozen=True)
class Roberta(Bert):
    """The model as pure functions of its parameters; see Encoder. A classifier's own dense layer stands in the pooler's place,
    and is frozen like it; a PEFT adapter that brings a trained one has it in its head."""

    base: ClassVar = "roberta"
    pooler_module: ClassVar = "classifier.dense"
    head_dense: ClassVar = "classifier.dense"
    head_output: ClassVar = "classifier.out_proj"
    transform_modules: ClassVar = {"dense": "lm_head.dense", "norm": "lm_head.layer_norm"}
    mlm_bias: ClassVar = "lm_head"
    ties: ClassVar = {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }
    carried: ClassVar = ("roberta.pooler.dense.weight", "roberta.pooler.dense.bias")

    def positions(self, batch):
        """The rows of the table of positions [B, T]: tokens that are not padding count up behind the id of padding, which is
        padding's own position."""
        if "position_ids" in batch:
            return batch["position_ids"]
        counted = (batch["input_ids"] != self.config.padding).astype(jnp.int32)
        return jnp.cumsum(counted, axis=1) * counted + self.config.padding

    def transform(self, params, x):
        """What the vocabulary is compared with; its activation is the exact GELU, whatever the layers'."""
        config = dataclasses.replace(self.config, activation="gelu")
        return Transform(config).apply({"params": params["mlm"]["transform"]}, x)


def from_config(hf, num_labels, pooling, normalize):
    """RobertaConfig from Hugging Face's `config.json` (a dict); refuses by name what is not implemented."""
    config, padding = bert.from_config(hf, num_labels, pooling, normalize), hf.get("pad_token_id", 1)
    if type(padding) is not int or not 0 <= padding < config.max_positions - 1:
        raise InputError(f"config.json: pad_token_id={padding!r} leaves no position of {config.max_positions}.")
    fields = dataclasses.asdict(config) | {"max_positions": config.max_positions - padding - 1}
    return RobertaConfig(**fields, padding=padding)


def build(hf, checkpoint, num_labels, dtype):
    """The Roberta that config.json `hf` describes."""
    how = encoder.pooling(hf, checkpoint, Roberta.pooler_module, Roberta.head_output)
    return Roberta(from_config(hf, num_labels, *how), dtype)


FAMILY = Family(
    {
        "roberta": ("RobertaForMaskedLM", "RobertaForSequenceClassification"),
        "xlm-roberta": ("XLMRobertaForMaskedLM", "XLMRobertaForSequenceClassification"),
    },
    build,
    bare={"roberta": "RobertaModel", "xlm-roberta": "XLMRobertaModel"},
    bidirectional=True,
)
