"""The header of a model card, by which the hub finds and sorts a model: YAML, between two lines of dashes.

Its keys: https://huggingface.co/docs/hub/model-cards. `license` is left to the person who publishes.
"""

import math

from dplora_jax.federation import held_out, methods, trust
from experiments.text import formats

# The hub's name of each metric.
METRIC_TYPES = {
    "accuracy": "accuracy",
    "macro_f1": "f1",
    "perplexity": "perplexity",
    "token_f1": "f1",
    "rouge_l": "rouge",
}


def text(job, library, task, base):
    """The header of an export.Job: `library` and `task` (the hub's pipeline_tag) by their names there, `base` the hub's id of
    the base, or None. Every value is quoted as YAML has it."""
    from huggingface_hub import ModelCardData

    adapter, run = library in ("peft", "gguf"), job.run
    confirmed = run is not None and run.ledger.holds
    private = confirmed and run.stored.private
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if adapter and base else None,
        library_name=library,
        pipeline_tag=task,
        tags=["lora", *(["federated-learning"] if run else []), *(["differential-privacy"] if private else [])],
        differential_privacy=privacy(run) if private else None,
        **(_metrics(job, task) if confirmed else {}),
    )
    return f"---\n{data.to_yaml()}\n---"


def privacy(run):
    """{name: value} of what an export.Run guarantees: its largest epsilon, delta, unit, neighbours and trust mode, and the
    epsilon that scores cost the records that are kept back for them."""
    flags = run.stored.config
    return {
        "epsilon": _number(run.last["epsilon_max"]) if run.last else None,
        "delta": flags.privacy.delta,
        "unit": unit(flags),
        "neighbours": f"one {_whole(flags)} is replaced by a null {_whole(flags)}, which contributes nothing",
        "trust": flags.privacy.trust,
        "release": plain(run.stored.release),
        **({"epsilon_of_scores": _number(run.last[held_out.SPENT])} if held_out.SPENT in run.last else {}),
    }


def unit(flags):
    """What is protected as one, in words."""
    settings = flags.privacy
    if trust.mode(flags).bare_clients:
        return "one client with all its records"
    if settings.unit_column is not None:
        return plain(f"all rows of one client with the same value in column '{settings.unit_column}'")
    rows = f", in up to {settings.unit_rows} rows" if settings.by_unit else ""
    return f"one record of one client{rows}"


def plain(text):
    """`text` on one line, without what UTF-8 cannot have."""
    return " ".join(str(text).encode("utf-8", "replace").decode().split())


def _whole(flags):
    return "client" if trust.mode(flags).bare_clients else flags.privacy.unit


def _number(epsilon):
    """An epsilon to two decimals, rounded up."""
    return float(formats.epsilon(epsilon)) if math.isfinite(epsilon) else "inf"


def _metrics(job, task):
    """`metrics` and the model-index of a run's last scores on its public test set; of clients' own models, nothing."""
    from huggingface_hub import EvalResult

    flags, last = job.run.stored.config, job.run.last
    shown = {name: float(last[name]) for name in METRIC_TYPES if name in last and math.isfinite(float(last[name]))}
    if not shown or methods.BY_NAME[flags.aggregation.method].personal:
        return {}
    dataset = plain(flags.data.dataset)
    results = [
        EvalResult(
            task, dataset, f"{dataset} (public test set)", METRIC_TYPES[name], value, metric_name=formats.METRICS[name]
        )
        for name, value in shown.items()
    ]
    metrics = list(dict.fromkeys(METRIC_TYPES[name] for name in shown))
    return {"metrics": metrics, "model_name": plain(job.out.resolve().name), "eval_results": results}
