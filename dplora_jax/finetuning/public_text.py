"""What public text tells of a base model before training: where a head's features lie, which label's word it prefers, and by what
directions texts differ."""

import base64
import functools
import math
import warnings

import jax
import numpy as np

from dplora_jax import evaluation, losses
from dplora_jax.data import demos
from dplora_jax.errors import InputError, InputWarning
from dplora_jax.federation import fingerprints, frozen_layers, processes, program
from dplora_jax.models import features, public_bases

FEATURE_ROWS, WORD_ROWS, BASES_ROWS = 512, 64, 96  # of public text that are looked at, evenly spaced
ENOUGH = 20  # public test records, from which on their text tells where features lie
STAND_IN = "finance_demo"  # whose text tells it where there are fewer
OUTPUTS = 4  # of a classifier or of label words, by whose gradients bases are chosen, at most


def with_measured(config, model, params, objective, test, memo, stored):
    """`params` with what is measured, if anything is, under `features.KEY`: as an earlier start had it (its checkpoints go with
    it), else as process 0 measures it on `test`, the rows of the public test set, whose labels are not used. `stored` and `memo`
    as for `setup.prepare`. Raises InputError."""
    if config.base.feature_norm and not centres(config, params):
        warnings.warn(
            f"feature_norm={config.base.feature_norm:g} changes nothing here: only a classifier whose head has a bias, such as "
            "BERT's, has features to centre.",
            InputWarning,
            stacklevel=2,
        )
    if stored:
        measured = _fitting(stored["federation"].get(features.KEY), config, model, params, objective)
    else:
        processes.at("measuring public text")
        measured = arrays(processes.agree(lambda: _measured(config, model, params, objective, test, memo)))
    if not measured:
        return params
    head = {"head": features.inward(params["head"], measured)} if centres(config, params) else {}
    return params | {features.KEY: measured} | head


def centres(config, params):
    """Whether the head's features are centred and scaled: `feature_norm` asks for it, and the model has a head with a bias."""
    return bool(config.base.feature_norm) and "bias" in params.get("head", {})


def norm(config):
    """What the head's features are scaled to. Without clipping that is 1 at most: long features would make long gradients."""
    asked = config.base.feature_norm
    return asked if math.isfinite(config.privacy.clip_norm) else min(asked, 1.0)


def said(params):
    """What was measured, for config.json; None where nothing was."""
    if features.KEY not in params:
        return None
    return _plain(jax.device_get(params[features.KEY]))


def arrays(measured):
    """float32 arrays of what `said` made of them. Raises TypeError or ValueError where that is something else."""
    if not isinstance(measured, dict):
        return np.asarray(measured, np.float32)
    if set(measured) == {"shape", "float32"}:
        return np.frombuffer(base64.b64decode(measured["float32"]), "<f4").reshape(measured["shape"])
    return {name: arrays(part) for name, part in measured.items()}


def _fitting(measured, config, model, params, objective):
    """Arrays of what config.json, or a plan that another party wrote, says was measured. Raises InputError where that is not all
    that `config` asks for, of the model's shapes and finite."""
    expected = {}
    if centres(config, params):
        expected |= {"center": params["head"]["kernel"].shape[:1], "scale": ()}
    if objective.words:
        expected["bias"] = (len(objective.words),)
    if config.lora.core:
        shapes = public_bases.shapes(model, params, program.lora_config(config))
        expected[features.BASES] = jax.tree.map(lambda base: base.shape, shapes)
    try:
        with np.errstate(over="ignore"):  # then it is infinite
            found = arrays(measured or {})
        fits = jax.tree.map(np.shape, found) == expected and all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise InputError(
            "what is said to be measured on public text does not fit this model and these settings, or is no numbers: let the "
            "plan, or the run, be made anew."
        )
    return found


def _plain(tree):
    """A dict of arrays as JSON: matrices as their shape and their bytes in base64, the rest as numbers."""
    if isinstance(tree, dict):
        return {name: _plain(part) for name, part in tree.items()}
    array = np.asarray(tree, "<f4")
    if array.ndim < 2:
        return array.tolist()
    return {"shape": list(array.shape), "float32": base64.b64encode(array.tobytes()).decode()}


def _measured(config, model, params, objective, test, memo):
    """All that `config` asks for, as JSON."""
    measured = {}
    if centres(config, params):
        measured |= _features(config, model, params, objective, test, memo)
    if objective.words:
        rows = _some(objective.blank if test is None else test, WORD_ROWS)
        named = ("bias", *_base(config), objective.words)
        measured |= fingerprints.remembered(memo, named, rows, lambda: _bias(objective, model, params, rows))
    if config.lora.core:
        if test is None:
            raise InputError("`core` needs a public test set, whose text gives its A and B: give `test_data`.")
        if "labels" not in test:
            raise InputError("`core` needs a task with labels, whose logits tell texts apart: leave it out.")
        texts = _some(test, BASES_ROWS)
        named = (features.BASES, *_base(config), objective.words, program.lora_config(config))
        make = functools.partial(_bases, config, model, params, objective, texts)
        measured |= fingerprints.remembered(memo, named, texts, make)
    return measured


def _base(config):
    """What says which base model it is, in this process."""
    return config.base.name, config.base.dtype, config.base.quantize


def _bases(config, model, params, objective, texts):
    """A and B for each adapted matrix, by the gradients of the labels' words, or of random outputs of a classifier's features."""
    draws = np.random.default_rng(0)
    if objective.words:
        head = {}
        reader = losses.reader(objective.loss, model, params)
        mix = draws.standard_normal((len(objective.words), min(OUTPUTS, len(objective.words) - 1)))
    else:
        reader, mix = model, np.eye(OUTPUTS)
        shapes = {"kernel": (params["head"]["kernel"].shape[0], OUTPUTS), "bias": (OUTPUTS,)}
        head = {"head": {part: np.float32(draws.standard_normal(shapes[part])) for part in params["head"]}}

    def outputs(params, pairs, batch):
        return reader.apply(params, batch, {"layers": pairs, **head}) @ np.float32(mix)

    try:
        found = public_bases.bases(outputs, model, params, program.lora_config(config), texts)
    except ValueError as error:
        raise InputError(f"core: {error}") from None
    return {features.BASES: _plain(found)}


def _features(config, model, params, objective, test, memo):
    """`features.measure` of some public rows, as JSON: of the embedded headlines where the public test set has fewer than
    ENOUGH records. Raises InputError."""
    if test is None or len(test["attention_mask"]) < ENOUGH:
        warnings.warn(
            f"features are centred by embedded finance headlines, for lack of {ENOUGH} public test records: give "
            "`test_data`, or feature_norm=0 where your text is of another kind.",
            InputWarning,
            stacklevel=2,
        )
        test = objective.test(demos.load(STAND_IN, 0).test)
    named, rows = (features.KEY, *_base(config)), _some(test, FEATURE_ROWS)
    pooled = frozen_layers.remembered(memo, named, jax.jit(model.features), params, rows)
    try:
        measured = features.measure(pooled, norm(config))
    except ValueError as error:
        raise InputError(f"feature_norm={config.base.feature_norm:g}: {error}") from None
    return {name: value.tolist() for name, value in measured.items()}


def _bias(objective, model, params, rows):
    """{"bias": [K]}: the mean log-probability of each label's word among them, on public rows."""
    reader = losses.reader(objective.loss, model, params)
    likelihoods = jax.jit(lambda params, rows: evaluation.label_likelihoods(reader, params, None, rows))(params, rows)
    return {"bias": np.asarray(likelihoods).mean(0, dtype=np.float64).tolist()}


def _some(table, most):
    """Up to `most` rows of `table`, evenly spaced, as the model takes them."""
    count = len(table["attention_mask"])
    rows = np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))
    return {name: table[name][rows] for name in ("input_ids", "attention_mask")}
