"""What public text tells of a base model before training: where a head's features lie, and which label's word it prefers."""

import functools

import jax
import numpy as np

from dplora_jax import evaluation, losses
from dplora_jax.errors import InputError
from dplora_jax.federation import frozen_layers, processes
from dplora_jax.models import features

FEATURE_ROWS, WORD_ROWS = 512, 64  # of public text that are looked at, evenly spaced


def with_measured(config, model, params, objective, test, memo, stored):
    """`params` with what is measured, if anything is, under `features.KEY`: as an earlier start had it (its checkpoints go with
    it), else as process 0 measures it on `test`, the rows of the public test set, whose labels are not used. `stored` and `memo`
    as for `setup.prepare`."""
    if config.base.feature_norm:
        measure = functools.partial(_features, config, model, params, test, memo)
    elif objective.words:
        measure = functools.partial(_bias, objective, model, params, test)
    else:
        return params
    kept = stored["federation"].get(features.KEY) if stored else None
    if config.base.feature_norm:
        _check_features(params, kept or test)
    measured = {name: np.asarray(value, np.float32) for name, value in (kept or processes.agree(measure)).items()}
    head = {"head": features.inward(params["head"], measured)} if config.base.feature_norm else {}
    return params | {features.KEY: measured} | head


def said(params):
    """What was measured, for config.json: {name: number or list}; None where nothing was."""
    if features.KEY not in params:
        return None
    return {name: np.asarray(value).tolist() for name, value in jax.device_get(params[features.KEY]).items()}


def _check_features(params, source):
    if "bias" not in params.get("head", {}):
        raise InputError("`feature_norm` needs a classifier whose head has a bias, such as BERT's: leave it out.")
    if source is None:
        raise InputError("`feature_norm` needs a public test set to be measured on: give `test_data`.")


def _features(config, model, params, test, memo):
    """`features.measure` of some public rows, as JSON."""
    named = (features.KEY, config.base.name, config.base.dtype, config.base.quantize)
    pooled = frozen_layers.remembered(memo, named, jax.jit(model.features), params, _some(test, FEATURE_ROWS))
    try:
        measured = features.measure(pooled, config.base.feature_norm)
    except ValueError as error:
        raise InputError(f"feature_norm={config.base.feature_norm:g}: {error}") from None
    return {name: value.tolist() for name, value in measured.items()}


def _bias(objective, model, params, test):
    """{"bias": [K]}: the mean log-probability of each label's word among them, on some public rows, or on a prompt without text
    where there are none."""
    rows = _some(objective.blank if test is None else test, WORD_ROWS)
    reader = losses.reader(objective.loss, model, params)
    words = jax.jit(lambda params, rows: evaluation.label_likelihoods(reader, params, None, rows))(params, rows)
    return {"bias": np.asarray(words).mean(0, dtype=np.float64).tolist()}


def _some(table, most):
    """Up to `most` rows of `table`, evenly spaced, as the model takes them."""
    count = len(table["attention_mask"])
    rows = np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))
    return {name: table[name][rows] for name in ("input_ids", "attention_mask")}
