"""What a noisy LoRA step, a round and many clients cost: `python -m experiments.benchmark` (`command`)."""
