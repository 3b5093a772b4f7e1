"""llama.cpp's logits of a base and an adapter in GGUF, by a Python that has llama-cpp-python; nothing of ours is imported:

python tests/llama_cpp_logits.py BASE.gguf ADAPTER.gguf TOKENS.npy LOGITS.npy

TOKENS is int32 [T]; LOGITS becomes float32 [2, T, V], of the base alone and with the adapter.
"""

import ctypes
import sys

import llama_cpp
import numpy as np


def logits(model, tokens, adapter=None):
    """[T, V] of one context."""
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(64, len(tokens))
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    context = llama_cpp.llama_init_from_model(model, settings)
    if adapter is not None:
        given, scale = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
        assert llama_cpp.llama_set_adapters_lora(context, given, 1, scale) == 0
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (width,)) for i in range(len(tokens))]
    return np.stack(rows)


def main(base, adapter, tokens, out):
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.use_extra_bufts = False  # weights as they are, not repacked for this CPU
    model = llama_cpp.llama_model_load_from_file(base.encode(), settings)
    read = llama_cpp.llama_adapter_lora_init(model, adapter.encode())
    assert model, "llama.cpp does not read the base"
    assert read, "llama.cpp does not read the adapter"
    ids = np.load(tokens)
    np.save(out, np.stack([logits(model, ids), logits(model, ids, read)]))


main(*sys.argv[1:])
