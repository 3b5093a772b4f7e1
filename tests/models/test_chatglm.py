"""What is ChatGLM's alone: an output matrix that its published code shares with the embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dplora_jax import models
from tests.conftest import GOLDEN


def test_a_checkpoint_that_saves_the_shared_matrix_once_gives_the_same_logits(tmp_path):
    source = GOLDEN / "chatglm_tiny"
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    shared = tensors.pop("lm_head.weight")
    np.testing.assert_array_equal(shared, tensors["transformer.word_embeddings.weight"])
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    model, params = models.from_pretrained(tmp_path)
    assert model.config.tied
    assert "lm_head" not in params
    golden = np.load(source / "golden.npz")
    batch = {name: jnp.asarray(golden[name]) for name in ("input_ids", "attention_mask", "position_ids")}
    np.testing.assert_allclose(jax.jit(model.apply)(params, batch), golden["logits"], atol=2e-4)
