"""Text from a language model, token by token: greedy or sampled, with a cache of keys and values, as one `lax.while_loop`.

Letters: B rows, T tokens of the longest prompt, N new tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dplora_jax.models.layers import attended


def generate(
    model, params, batch, *, max_new_tokens, adapter=None, end_tokens=(), pad_token=0, temperature=0.0, key=None
):
    """Continue each prompt of `batch` by up to `max_new_tokens` tokens -> [B, N] int32.

    `batch`: `input_ids` [B, T] and `attention_mask` [B, T] (absent = all) of prompts padded to the right; `model` a decoder
    without a classifier's head. A row ends with its first token of `end_tokens`, itself included, and is `pad_token` from there.
    `temperature` 0 takes the likeliest token; above it draws from softmax(logits / temperature), for which `key` is needed. The
    loop stops when every row has ended. Raises ValueError on prompts padded elsewhere (where they are not traced) or with
    `position_ids`, on prompts and new tokens that exceed the model's positions, and on a temperature without a key.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 1 or more.")
    if "position_ids" in batch:
        raise ValueError("prompts cannot have position_ids: the tokens that follow them would have none.")
    mask = batch.get("attention_mask")
    if mask is not None and not isinstance(mask, jax.core.Tracer) and (np.diff(np.asarray(mask, int)) > 0).any():
        raise ValueError("prompts must be padded to the right: a token is attended behind one that is not.")
    size = batch["input_ids"].shape[1] + max_new_tokens
    if size > model.config.max_positions:
        raise ValueError(f"{size} tokens are more than the model's {model.config.max_positions} positions.")
    if temperature > 0 and key is None:
        raise ValueError("a temperature above 0 needs a key.")
    return _generate(
        model, params, batch, adapter, jnp.asarray(end_tokens, jnp.int32), pad_token, temperature, key,
        max_new_tokens=max_new_tokens, greedy=temperature == 0,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "greedy"))
def _generate(model, params, batch, adapter, end_tokens, pad_token, temperature, key, *, max_new_tokens, greedy):
    length = attended(batch).sum(1).astype(jnp.int32)

    def choose(logits_BxV, step):
        if greedy:
            return logits_BxV.argmax(-1).astype(jnp.int32)
        return jax.random.categorical(jax.random.fold_in(key, step), logits_BxV / temperature).astype(jnp.int32)

    def unfinished(state):
        step, _, _, _, ended = state
        return (step < max_new_tokens) & ~ended.all()

    def one(state):
        step, out, token, cache, ended = state
        logits, cache = model.extend(params, batch, token, length + step - 1, cache, adapter)
        token = jnp.where(ended, pad_token, choose(logits, step))
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], step, 1)
        return step + 1, out, token, cache, ended | (token[:, None] == end_tokens).any(1)

    rows, tokens = batch["input_ids"].shape
    logits, cache = model.prefill(params, batch, tokens + max_new_tokens, adapter)
    token = choose(logits, 0)
    out = jnp.full((rows, max_new_tokens), pad_token, jnp.int32).at[:, 0].set(token)
    start = jnp.int32(1), out, token, cache, (token[:, None] == end_tokens).any(1)
    return jax.lax.while_loop(unfinished, one, start)[1]
