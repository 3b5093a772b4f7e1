"""What a decoder's config.json says: its number of parameters, what it leaves unsaid, and what is refused by name."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from dplora_jax import lora, models
from dplora_jax.errors import InputError
from dplora_jax.models import llama, pretrained
from dplora_jax.models.chatglm import Glm
from dplora_jax.models.chatglm2 import Glm2
from tests.conftest import GOLDEN

pytestmark = pytest.mark.usefixtures("quick_compile")
GPT2, LLAMA, GLM, GLM2, WINDOW = "gpt2_tiny", "llama_tiny", "chatglm_tiny", "chatglm2_tiny", "variants/mistral_window"
PUBLISHED = {  # numbers in all, and in PEFT's usual adapter of rank 8, as their authors and PEFT say; config.json's sizes
    "GPT-2": (124_439_808, 294_912, {
        "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
    }),
    "Mistral-7B": (7_241_732_096, 3_407_872, {
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "sliding_window": 4096,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 32768,
    }),
    "Qwen2-0.5B": (494_032_768, 540_672, {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24, "tie_word_embeddings": True,
        "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "max_position_embeddings": 32768,
    }),
    "ChatGLM2-6B": (6_243_584_000, 1_949_696, {
        "model_type": "chatglm", "padded_vocab_size": 65024, "hidden_size": 4096, "num_layers": 28, "kv_channels": 128,
        "num_attention_heads": 32, "ffn_hidden_size": 13696, "seq_length": 32768, "multi_query_attention": True,
        "multi_query_group_num": 2, "add_qkv_bias": True,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(name):
    count, adapted, hf = PUBLISHED[name]
    model = pretrained.build(hf, None, None, jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert lora.count(shapes) == count
    config = lora.LoraConfig(8, 32, ("q", "v"))
    assert lora.count(jax.eval_shape(lambda: lora.init(jax.random.key(0), model, shapes, config))) == adapted


def refusal(tmp_path, name, changes=(), **options):
    """The one sentence with which a folder is refused once its config is changed; None removes an option."""
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | dict(changes)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(InputError) as caught:
        models.from_pretrained(tmp_path, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (GPT2, {"add_cross_attention": True}, "add_cross_attention=True"),
        (GPT2, {"activation_function": "foo"}, "activation_function='foo'"),
        (GPT2, {"n_head": 5}, "n_head=5"),
        (GPT2, {"model_type": "t5"}, "model_type='t5'"),
        (LLAMA, {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        (LLAMA, {"rope_parameters": {"rope_type": "ntk", "factor": 2.0}}, "rope_type='ntk'"),
        (LLAMA, {"rope_parameters": {"rope_type": "yarn"}}, "incomplete"),
        (LLAMA, {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "incomplete"),
        (LLAMA, {"rope_parameters": {"rope_type": "linear"}}, "incomplete"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA, {"hidden_act": "foo"}, "hidden_act='foo'"),
        (LLAMA, {"head_dim": None, "num_attention_heads": 5}, "5 heads"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads=3"),
        (LLAMA, {"num_key_value_heads": "2"}, "num_key_value_heads='2'"),
        (LLAMA, {"rope_parameters": [1]}, "rope_parameters=[1]"),
        (LLAMA, {"rope_parameters": None, "rope_theta": "1e4"}, "rope_theta='1e4'"),
        (LLAMA, {"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6'"),
        ("variants/qwen2", {"mlp_bias": True}, "mlp_bias=True"),
        (WINDOW, {"attention_bias": True}, "attention_bias=True"),
        (WINDOW, {"sliding_window": 0}, "sliding_window=0"),
        (WINDOW, {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types="),
        (LLAMA, {"model_type": "mixtral", "num_local_experts": 8}, "a mixture of experts (mixtral, num_local_experts)"),
        (LLAMA, {"model_type": "qwen3_moe", "num_experts": 128}, "a mixture of experts (qwen3_moe, num_experts)"),
        (LLAMA, {"model_type": "deepseek_v3", "n_routed_experts": 256}, "a mixture of experts (deepseek_v3,"),
        ("families/qwen3", {"layer_types": ["full_attention"]}, "layer_types="),
        ("families/gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("families/gemma2", {"model_type": "gemma3"}, "model_type='gemma3'"),
        ("families/gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping=-1.0"),
        ("families/gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters="),
        ("families/gpt_neox", {"num_attention_heads": 5}, "num_attention_heads=5"),
        ("families/gpt_neox", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor=1.5"),
        ("families/phi3_long", {"rope_parameters": {"type": "dynamic"}}, "rope_type='dynamic'"),
        ("families/phi3_long", {"rope_parameters": {"type": "longrope", "short_factor": [1.0]}}, "incomplete"),
        ("families/olmo2", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ("families/roberta_mlm", {"pad_token_id": 64}, "pad_token_id=64"),
        ("families/roberta_mlm", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("families/distilbert_mlm", {"n_heads": 5}, "n_heads=5"),
        ("families/modernbert_mlm", {"decoder_bias": False}, "decoder_bias=False"),
        ("families/modernbert_mlm", {"layer_types": ["full_attention"]}, "layer_types="),
        (GLM, {"position_encoding_2d": False}, "position_encoding_2d=False"),
        (GLM, {"num_attention_heads": 5}, "num_attention_heads=5"),
        (GLM, {"quantization_bit": 4}, "quantization_bit=4"),
        (GLM2, {"rmsnorm": False}, "rmsnorm=False"),
        (GLM2, {"multi_query_group_num": 3}, "multi_query_group_num=3"),
        (GLM2, {"padded_vocab_size": None}, "padded_vocab_size=None"),  # its other keys tell the generation
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, name, changes, words):
    assert words in refusal(tmp_path, name, changes)


def test_what_a_config_leaves_unsaid_is_what_transformers_takes():
    sizes = dict.fromkeys(("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"), 8)
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 9}
    mistral, qwen2 = (llama.from_config(sizes | {"model_type": name}, None) for name in ("mistral", "qwen2"))
    assert mistral.window == 4096
    assert not mistral.qkv_bias
    assert qwen2.qkv_bias
    assert not qwen2.output_bias
    assert qwen2 == llama.from_config(sizes | {"model_type": "qwen2", "attention_bias": False}, None)


def test_the_two_chatglm_generations_are_told_apart_by_their_keys_and_neither_classifies(tmp_path):
    for name, family in ((GLM, Glm), (GLM2, Glm2)):
        assert type(models.from_pretrained(GOLDEN / name)[0]) is family
        assert "no classifier" in refusal(tmp_path / family.__name__, name, num_labels=3)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00008.bin"])
def test_a_pickled_checkpoint_is_refused_with_the_way_to_convert_it(tmp_path, file):
    shutil.copytree(GOLDEN / GLM2, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle.*save_pretrained, which writes safetensors"):
        models.from_pretrained(tmp_path)
