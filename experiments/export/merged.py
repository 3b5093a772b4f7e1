"""The adapter merged into its base: a checkpoint for transformers, or of a mean-pooled classifier for sentence-transformers."""

from dplora_jax.errors import InputError


def write(job, loaded, draft):
    """Write the checkpoint of an export.Job and a loading.Loaded into `draft` -> (its README.md, the line to end with)."""
    from dplora_jax import lora
    from dplora_jax.models import encoder, hf_checkpoint
    from experiments.run import model_card

    place, hf, model, _, labels, adapter, config = loaded
    if job.run and job.run.stored.config.base.quantize:
        kind = job.run.stored.config.base.quantize
        print(f"The run froze its base in {kind}; the adapter is merged into the base as it is, not rounded.")
    params, model = lora.merge(model, loaded.params, adapter, config), encoder.reading(model, adapter)
    tokenizer = _tokenizer(place, model, hf)
    pad = tokenizer.pad_token_id if tokenizer else hf.get("pad_token_id")
    document = hf_checkpoint.config(model, hf, labels, pad)
    hf_checkpoint.copy_side_files(place, draft, tokenizer, "auto_map" in hf)
    hf_checkpoint.save(draft, model, params, document, place, job.shard_bytes)
    if hf_checkpoint.averages(model):
        length = job.run and job.run.stored.config.data.max_length
        hf_checkpoint.save_modules(draft, model, params, labels, place, length)
    return model_card.text(job, model, document, config, labels), model_card.closing_line(job, model, document)


def _tokenizer(place, model, hf):
    """The tokenizer where the export needs more of it than its files: a GGUF file's, and a decoder's classifier's pad token."""
    from dplora_jax import models
    from dplora_jax.models import registry

    if not place.is_file() and (model.config.num_labels is None or registry.bidirectional(hf["model_type"])):
        return None
    try:
        return models.load_tokenizer(place)
    except InputError:
        if place.is_file() or hf.get("pad_token_id") is None:
            raise
        return None
