"""Makes the reference values of `families/`, with PyTorch, transformers and PEFT, none of which the project needs.

    python -m venv reference && reference/bin/pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2
    reference/bin/python tests/golden/make_families.py [NAME ...]

Takes a minute. README.md says what the files hold.
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import peft
import torch
import transformers

HERE = pathlib.Path(__file__).parent / "families"
VOCABULARY, TOKENS, LENGTHS = 61, 13, (13, 9, 5)
SIZES = {
    "vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
DECODER = SIZES | {
    "hidden_size": 32, "intermediate_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-3,
}  # fmt: skip
ENCODER = SIZES | {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "layer_norm_eps": 1e-2}
ROBERTA = ENCODER | {"pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1}
DISTILBERT = {
    "vocab_size": VOCABULARY, "n_layers": 2, "n_heads": 4, "dim": 24, "hidden_dim": 40, "max_position_embeddings": 64,
}  # fmt: skip
MODERNBERT = SIZES | {
    "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 4, "norm_eps": 1e-2, "num_hidden_layers": 3,
    "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
NEOX = SIZES | {
    "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2, "layer_norm_eps": 1e-2,
}  # fmt: skip
GEMMA = DECODER | {"head_dim": 12, "sliding_window": 4, "num_hidden_layers": 3, "query_pre_attn_scalar": 20}
GEMMA3 = GEMMA | {"sliding_window_pattern": 3}
PHI_FACTORS = {"short_factor": [1.1, 1.3], "long_factor": [1.5, 3.0]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
LONG = {"rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.5} | PHI_FACTORS
CASES = {  # name: (class, settings); the seed is the place in this table
    "roberta_classifier": ("RobertaForSequenceClassification", ROBERTA),
    "roberta_mlm": ("RobertaForMaskedLM", ROBERTA),
    "xlm_roberta_mlm": ("XLMRobertaForMaskedLM", ROBERTA | {"hidden_act": "gelu_new"}),
    "distilbert_classifier": ("DistilBertForSequenceClassification", DISTILBERT),
    "distilbert_mlm": ("DistilBertForMaskedLM", DISTILBERT | {"activation": "relu"}),
    "modernbert_classifier": ("ModernBertForSequenceClassification", MODERNBERT),
    "modernbert_mean": (
        "ModernBertForSequenceClassification",
        MODERNBERT | {"classifier_pooling": "mean", "classifier_bias": True, "norm_bias": True, "attention_bias": True,
                      "mlp_bias": True, "global_attn_every_n_layers": 2},
    ),
    "modernbert_mlm": ("ModernBertForMaskedLM", MODERNBERT),
    "qwen3": ("Qwen3ForCausalLM", DECODER | {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3_window": (
        "Qwen3ForCausalLM",
        DECODER | {"head_dim": 12, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
                   "attention_bias": True},
    ),
    "qwen3_classifier": ("Qwen3ForSequenceClassification", DECODER | {"head_dim": 12}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2_classifier": ("Gemma2ForSequenceClassification", GEMMA),
    "gemma3": ("Gemma3ForCausalLM", GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "gpt_neox": ("GPTNeoXForCausalLM", NEOX),
    "gpt_neox_sequential": (
        "GPTNeoXForCausalLM", NEOX | {"use_parallel_residual": False, "rotary_pct": 0.5, "hidden_act": "gelu_new"},
    ),
    "gpt_neox_classifier": ("GPTNeoXForSequenceClassification", NEOX),
    "phi3": ("Phi3ForCausalLM", DECODER | {"sliding_window": 4}),
    "phi3_long": ("Phi3ForCausalLM", DECODER | {"rope_parameters": LONG, "original_max_position_embeddings": 8}),
    "phi3_short": (
        "Phi3ForCausalLM",
        DECODER | {"rope_parameters": LONG, "original_max_position_embeddings": 16, "tie_word_embeddings": True},
    ),
    "olmo2": ("Olmo2ForCausalLM", DECODER),
    "olmo3": ("Olmo3ForCausalLM", DECODER | {"num_hidden_layers": 4, "sliding_window": 4, "rope_scaling": YARN}),
    "llama_yarn": ("LlamaForCausalLM", DECODER | {"rope_parameters": YARN | {"attention_factor": 1.2}}),
    "mistral_yarn": (
        "MistralForCausalLM",
        DECODER | {"sliding_window": None, "rope_parameters": YARN | {"mscale": 1.5, "mscale_all_dim": 0.5}},
    ),
    "qwen2_window": (
        "Qwen2ForCausalLM", DECODER | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "llama_longrope": (
        "LlamaForCausalLM",
        DECODER | {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 8, "factor": 4.0,
                                       "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.0, 4.0]}},
    ),
}  # fmt: skip
ADAPTED = (  # with an adapter of PEFT's "all-linear"
    *("roberta_classifier", "distilbert_classifier", "modernbert_classifier", "qwen3", "qwen3_classifier", "gemma2"),
    *("gemma3", "gpt_neox", "phi3", "olmo2"),
)
# Of a DistilBERT, PEFT refuses "all-linear": it would both adapt pre_classifier and save it, as its name ends in a head's.
TARGETS = {"distilbert_classifier": ["q_lin", "v_lin", "lin1"]}


def draw(parameters, generator):
    """Give every parameter, by name, a random value; one-dimensional weights (norms) one near their usual value."""
    for name, parameter in sorted(parameters):
        value = 0.2 * torch.randn(parameter.shape, generator=generator)
        parameter.data = value + 1 if parameter.ndim == 1 and name.endswith("weight") else value


def make(name):
    """Write one folder."""
    class_name, settings = CASES[name]
    seed = 200 + list(CASES).index(name)
    model_class = getattr(transformers, class_name)
    labels = {"num_labels": 3} if "Sequence" in class_name else {}
    model = model_class(model_class.config_class(**settings, **labels, attn_implementation="eager")).eval()
    draw(model.named_parameters(), torch.Generator().manual_seed(seed))
    model.tie_weights()
    rng = np.random.default_rng(seed)
    mask = (np.arange(TOKENS) < np.array(LENGTHS)[:, None]).astype(np.int32)
    ids = rng.integers(3, VOCABULARY, (3, TOKENS)).astype(np.int32)
    ids = np.where(mask, ids, getattr(model.config, "pad_token_id", 0) or 0)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    def logits(model):
        with torch.no_grad():
            return model(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long()).logits.numpy()

    values = {"input_ids": ids, "attention_mask": mask, "logits": logits(model)}
    if name in ADAPTED:
        task, targets = "SEQ_CLS" if labels else "CAUSAL_LM", TARGETS.get(name, "all-linear")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type=task))
        trained = [(n, p) for n, p in adapted.named_parameters() if p.requires_grad]
        draw(trained, torch.Generator().manual_seed(seed + 100))
        adapted.eval().save_pretrained(folder / "adapter")
        (folder / "adapter" / "README.md").unlink(missing_ok=True)
        path = folder / "adapter" / "adapter_config.json"
        document = json.loads(path.read_text()) | {"base_model_name_or_path": None}
        listed = document["target_modules"]
        document["target_modules"] = sorted(listed) if isinstance(listed, list) else listed
        path.write_text(json.dumps(document, indent=2) + "\n")
        values["adapted_logits"] = logits(adapted)
    np.savez_compressed(folder / "golden.npz", **values)
    print(name, seed, values["logits"].shape, round(float(values["logits"].std()), 3))


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        make(case)
