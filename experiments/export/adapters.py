"""The adapter alone: in PEFT's format, and as a GGUF file for llama.cpp and Ollama."""

GGUF_FILE = "adapter.gguf"


def write_peft(job, loaded, draft):
    """Write PEFT's two files of an export.Job and a loading.Loaded into `draft` -> (its README.md, the line to end with)."""
    from dplora_jax import lora, peft
    from dplora_jax.models.pretrained import hub_id

    adapter = lora.with_frozen(loaded.params, loaded.adapter)
    peft.save(draft, loaded.model, adapter, loaded.config, hub_id(job.model))
    use = '```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, "path/to/this")\n```'
    return _told(job, loaded, "peft", use, f"PeftModel.from_pretrained(base, {str(job.out)!r})")


def write_gguf(job, loaded, draft):
    """Write GGUF_FILE of an export.Job and a loading.Loaded into `draft` -> (its README.md, the line to end with)."""
    from dplora_jax import gguf_adapter
    from dplora_jax.models.pretrained import hub_id

    kind, note = loaded.hf["model_type"], f"Release: {job.release}."
    gguf_adapter.save(
        draft / GGUF_FILE, loaded.model, loaded.adapter, loaded.config, kind, hub_id(job.model), description=note
    )
    use = (
        f"```sh\nllama-cli -m base.gguf --lora {GGUF_FILE}\n```\n\nIn Ollama's Modelfile: `ADAPTER ./{GGUF_FILE}` below the "
        "base's `FROM`. The base in GGUF has to be of the same model."
    )
    return _told(job, loaded, "gguf", use, f"llama-cli -m base.gguf --lora {job.out / GGUF_FILE}")


def _told(job, loaded, library, use, call):
    """(the README.md of an adapter, the line to end with)."""
    from dplora_jax.models import hf_checkpoint
    from experiments.run import model_card

    model = loaded.model
    document = {"architectures": [hf_checkpoint.class_name(model, loaded.hf)]}
    card = model_card.adapter_text(job, model, document, loaded.config, loaded.labels, library, use)
    return card, f"Wrote the adapter to {job.out}: {call} reads it. Release: {job.release}."
