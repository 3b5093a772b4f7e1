"""A head's features, centred and scaled by public text before training (`models.features`)."""

import jax
import numpy as np

from dplora_jax.errors import InputError
from dplora_jax.federation import frozen_layers, processes
from dplora_jax.models import features

PUBLIC_ROWS = 512  # whose features are looked at, evenly spaced


def with_features(config, model, params, test, memo, stored):
    """`params` with how features are centred, and the head on them, where `feature_norm` asks for it: as an earlier start had it
    (its checkpoints hold a head on those), else as process 0 measures it on public text."""
    if not config.base.feature_norm:
        return params
    if "bias" not in params.get("head", {}):
        raise InputError("`feature_norm` needs a classifier whose head has a bias, such as BERT's: leave it out.")
    measured = stored["federation"].get("features") if stored else None
    if test is None and not measured:
        raise InputError("`feature_norm` needs a public test set to be measured on: give `test_data`.")
    measured = measured or processes.agree(lambda: _measured(config, model, params, test, memo))
    measured = {name: np.asarray(value, np.float32) for name, value in measured.items()}
    return params | {features.KEY: measured, "head": features.inward(params["head"], measured)}


def _measured(config, model, params, test, memo):
    """`features.measure` of some public rows, as JSON."""
    count = len(test["attention_mask"])
    rows = np.unique(np.linspace(0, count - 1, min(count, PUBLIC_ROWS)).astype(int))
    inputs = {name: test[name][rows] for name in ("input_ids", "attention_mask")}
    named = (features.KEY, config.base.name, config.base.dtype, config.base.quantize)
    pooled = frozen_layers.remembered(memo, named, jax.jit(model.features), params, inputs)
    try:
        measured = features.measure(pooled, config.base.feature_norm)
    except ValueError as error:
        raise InputError(f"feature_norm={config.base.feature_norm:g}: {error}") from None
    return {name: value.tolist() for name, value in measured.items()}
