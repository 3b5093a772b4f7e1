"""Federated, differentially private LoRA fine-tuning of language models, as pure JAX functions."""
