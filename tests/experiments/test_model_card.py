"""What adapter files say of themselves."""

import dataclasses

from dplora_jax.models import bert, gpt2
from experiments.run import model_card

POOLED = bert.Bert(bert.BertConfig(9, 4, 1, 2, 8, 6, 2, num_labels=3))
AVERAGED = dataclasses.replace(POOLED, config=dataclasses.replace(POOLED.config, pooling="mean"))


def test_only_a_mean_pooled_classifiers_adapter_says_that_transformers_pools_otherwise():
    assert "reads the first token alone" in model_card.adapter_note(AVERAGED, "the end")
    for model in (POOLED, gpt2.Gpt2(gpt2.Gpt2Config(9, 4, 1, 2, 8, 6))):
        assert model_card.adapter_note(model, "the end") == "# LoRA adapter\n\nthe end\n"


def test_a_classifiers_adapter_notes_its_labels_in_the_order_of_the_head():
    note = model_card.adapter_note(POOLED, "the end", ("bad", 'so, "so"', "gut"))
    assert note.endswith('\n\nLabels, in the order of the head\'s outputs: ["bad", "so, \\"so\\"", "gut"]\n')
    assert "Labels" not in model_card.adapter_note(gpt2.Gpt2(gpt2.Gpt2Config(9, 4, 1, 2, 8, 6)), "the end", ("a", "b"))
