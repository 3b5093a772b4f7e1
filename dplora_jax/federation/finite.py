"""What tells that a run cannot train, before it is charged for more: from public facts alone.

Such are the base's weights, metrics on the public test set (or of a public sentence), the released adapter, and whose noisy
uploads were finite. Whether private records have finite gradients is private, and decides nothing here.
"""

import math

import jax
import jax.numpy as jnp

from dplora_jax import files
from dplora_jax.errors import InputError, NotFiniteError
from dplora_jax.federation import aggregation

METRICS = ("accuracy", "macro_f1", "perplexity")  # of the regular evaluation
SAVED = "Nothing more was charged, and all that was saved stays"

_finite = jax.jit(aggregation.finite)


def check_weights(name, params):
    """Raise InputError where a weight of the base model `name` is not finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not _finite(leaf):
            where = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
            raise InputError(
                f"model={name}: its weights {where} hold numbers that are not finite: the checkpoint is damaged, or was saved "
                "when its own training had failed; take another."
            )


def check(state, lines, probe=None):
    """Raise NotFiniteError (InputError before the first round) where the newest `state`, the metrics `lines` or, of a run that
    evaluates on nothing else, the metrics `probe(state)` of a public sentence are not finite."""
    last = lines[-1]
    if not _finite(state):
        raise NotFiniteError(
            f"the adapter is not finite after round {last['round']}: the learning rates are too large. {SAVED}; start a new "
            "`workdir` with smaller ones."
        )
    if last.get("finished") == 0 and last.get("dropped"):
        raise NotFiniteError(
            f"no client's upload of round {last['round']} was finite, so that it changed nothing: the learning rates are too "
            f"large. {SAVED}; start a new `workdir` with smaller ones."
        )
    for line in reversed(lines):
        if any(name in line for name in METRICS):
            _check_metrics(line, "the public test set")
            break
    if probe is not None:
        _check_metrics(probe(state) | {"round": last["round"]}, "a public sentence")


def _check_metrics(line, measured_on):
    """Raise where a metrics line has metrics and none is finite."""
    metrics = {name: line[name] for name in METRICS if name in line}
    each = [value for name in metrics for value in (metrics[name], *line.get(f"{name}_by_client", ()))]
    if not each or any(math.isfinite(files.number(value)) for value in each):
        return
    sentence = f"no metric of {measured_on} is finite ({', '.join(metrics)})"
    if not line.get("round"):
        raise InputError(
            f"before any training, {sentence}: check the weights of `model`, its config.json and its tokenizer. Nothing was "
            "charged."
        )
    raise NotFiniteError(
        f"after round {line['round']}, {sentence}: the adapter is useless, most often because the learning rates are too large. "
        f"{SAVED}; start a new `workdir` with smaller ones."
    )
