"""The shapes of models that a plan is asked for by name: what their published config.json say of it."""


def _llama(width, layers, heads, kv_heads, mlp_width, vocabulary=32000, positions=4096, model_type="llama", **more):
    return {
        "model_type": model_type, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": mlp_width, "vocab_size": vocabulary,
        "max_position_embeddings": positions, "rms_norm_eps": 1e-5,
    } | more  # fmt: skip


def _llama3(width, layers, heads, kv_heads, mlp_width, factor=8.0, **more):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    more |= {"rope_theta": 500000.0, "rope_scaling": scaling}
    return _llama(width, layers, heads, kv_heads, mlp_width, 128256, 131072, **more)


def _qwen2(width, layers, heads, kv_heads, mlp_width, vocabulary=152064, **more):
    more |= {"rope_theta": 1e6, "rms_norm_eps": 1e-6}
    return _llama(width, layers, heads, kv_heads, mlp_width, vocabulary, 32768, "qwen2", **more)


def _qwen3(width, layers, heads, mlp_width, **more):
    more |= {"head_dim": 128, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
    return _llama(width, layers, heads, 8, mlp_width, 151936, 40960, "qwen3", **more)


def _gemma2(width, layers, heads, kv_heads, mlp_width, **more):
    more |= {"sliding_window": 4096, "rms_norm_eps": 1e-6}
    return _llama(width, layers, heads, kv_heads, mlp_width, 256000, 8192, "gemma2", **more)


def _gemma3(width, layers, mlp_width, vocabulary=262144, **more):
    more |= {"sliding_window": 512, "rms_norm_eps": 1e-6}
    return _llama(width, layers, 4, 1, mlp_width, vocabulary, 32768, "gemma3_text", **more)


def _neox(width, layers, heads, vocabulary=50304, **more):
    return {
        "model_type": "gpt_neox", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 4 * width, "vocab_size": vocabulary, "max_position_embeddings": 2048,
    } | more  # fmt: skip


def _bert(model_type, width, layers, heads, vocabulary, positions, segments, **more):
    return {
        "model_type": model_type, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 4 * width, "vocab_size": vocabulary, "max_position_embeddings": positions,
        "type_vocab_size": segments,
    } | more  # fmt: skip


def _modernbert(width, layers, heads, mlp_width):
    return {
        "model_type": "modernbert", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": mlp_width, "vocab_size": 50368, "max_position_embeddings": 8192,
    }  # fmt: skip


TIED = {"tie_word_embeddings": True}
OLMO2 = {"model_type": "olmo2", "rope_theta": 500000.0, "rms_norm_eps": 1e-6}
KNOWN = {
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
    },
    "bert-base": _bert("bert", 768, 12, 12, 30522, 512, 2),
    "roberta-base": _bert("roberta", 768, 12, 12, 50265, 514, 1),
    "roberta-large": _bert("roberta", 1024, 24, 16, 50265, 514, 1),
    "xlm-roberta-base": _bert("xlm-roberta", 768, 12, 12, 250002, 514, 1),
    "distilbert-base": {
        "model_type": "distilbert", "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072, "vocab_size": 30522,
        "max_position_embeddings": 512,
    },
    "modernbert-base": _modernbert(768, 22, 12, 1152),
    "modernbert-large": _modernbert(1024, 28, 16, 2624),
    "smollm2-135m": _llama(576, 30, 9, 3, 1536, 49152, 8192, rope_theta=100000, **TIED),
    "llama2-7b": _llama(4096, 32, 32, 32, 11008),
    "llama2-13b": _llama(5120, 40, 40, 40, 13824),
    "llama2-70b": _llama(8192, 80, 64, 8, 28672),
    "llama3-8b": _llama(4096, 32, 32, 8, 14336, 128256, 8192, rope_theta=500000.0),
    "llama3.1-8b": _llama3(4096, 32, 32, 8, 14336),
    "llama3.1-70b": _llama3(8192, 80, 64, 8, 28672),
    "llama3.2-1b": _llama3(2048, 16, 32, 8, 8192, 32.0, **TIED),
    "llama3.2-3b": _llama3(3072, 28, 24, 8, 8192, 32.0, **TIED),
    "mistral-7b": _llama(4096, 32, 32, 8, 14336, 32000, 32768, "mistral", sliding_window=4096),
    "qwen2.5-0.5b": _qwen2(896, 24, 14, 2, 4864, 151936, **TIED),
    "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 18944),
    "qwen2.5-72b": _qwen2(8192, 80, 64, 8, 29568),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, **TIED),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, **TIED),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, **TIED),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288),
    "qwen3-14b": _qwen3(5120, 40, 40, 17408),
    "qwen3-32b": _qwen3(5120, 64, 64, 25600),
    "gemma2-2b": _gemma2(2304, 26, 8, 4, 9216),
    "gemma2-9b": _gemma2(3584, 42, 16, 8, 14336),
    "gemma2-27b": _gemma2(4608, 46, 32, 16, 36864, head_dim=128, query_pre_attn_scalar=144),
    "gemma3-270m": _gemma3(640, 18, 2048),
    "gemma3-1b": _gemma3(1152, 26, 6912),
    "phi3-mini": _llama(3072, 32, 32, 32, 8192, 32064, 4096, "phi3", sliding_window=2047),
    "phi4": _llama(5120, 40, 40, 10, 17920, 100352, 16384, "phi3", rope_theta=250000),
    "pythia-160m": _neox(768, 12, 12),
    "pythia-410m": _neox(1024, 24, 16),
    "pythia-1.4b": _neox(2048, 24, 16),
    "pythia-6.9b": _neox(4096, 32, 32, 50432),
    "gpt-neox-20b": _neox(6144, 44, 64, 50432, hidden_act="gelu_fast"),
    "olmo2-1b": _llama(2048, 16, 16, 16, 8192, 100352, **OLMO2),
    "olmo2-7b": _llama(4096, 32, 32, 32, 11008, 100352, **OLMO2),
    "olmo2-13b": _llama(5120, 40, 40, 40, 13824, 100352, **OLMO2),
    "olmo2-32b": _llama(5120, 64, 40, 8, 27648, 100352, **OLMO2),
    "chatglm-6b": {
        "model_type": "chatglm", "vocab_size": 130528, "hidden_size": 4096, "num_layers": 28, "num_attention_heads": 32,
        "inner_hidden_size": 16384, "max_sequence_length": 2048, "bos_token_id": 130004, "gmask_token_id": 130001,
        "mask_token_id": 130000, "position_encoding_2d": True,
    },
}  # fmt: skip
