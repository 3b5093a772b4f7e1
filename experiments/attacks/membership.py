"""Membership inference against a finished adapter: does a record's loss tell that it was trained on?"""

import collections

import jax
import numpy as np

from dplora_jax import evaluation, models
from dplora_jax.config import field_value, replace
from dplora_jax.errors import InputError
from dplora_jax.federation import storage
from dplora_jax.finetuning import dealing, objectives, setup
from experiments.attacks import canaries

ROWS = 64  # at a time through the model


def attack(config, seed=None):
    """Train as `config` says and attack the adapter that is released -> {"tpr_at_0.001", "tpr_at_0.01", "auc", "members",
    "others"}.

    Members are the clients' records, the others the test set's. A record's score is how much its loss fell from the base
    model's, which calibrates for hard and easy records (Watson et al. 2021, arXiv 2111.08440). Raises InputError.
    """
    for name, attacked in canaries.PLAIN:
        if (field_value(config, name) or None) != (attacked or None):
            raise InputError(f"--{name}={field_value(config, name)} cannot be attacked yet, only {attacked}.")
    job = setup.prepare(replace(config, eval_every=0, seed=config.privacy.seed if seed is None else seed))
    collections.deque(job.federation.fit(job.shards, storage.InMemory(), start=job.start), maxlen=0)
    objective, tables = _tables(config)

    def losses(prepared):
        model, params = prepared.whole_model, prepared.params

        def each(adapter):
            return [_losses(objective.loss, model, params, adapter, table) for table in tables]

        return lambda adapter, residual, ends: {"before": each(None), "after": each(adapter)}

    # The adapter as the rounds have it: with `feature_norm`, its head is on the features of `params`.
    measured = job.federation.evaluate(losses)
    members, others = (x - y for x, y in zip(measured["before"], measured["after"], strict=True))
    return rates(members, others)


def rates(members, others):
    """What scores [N], higher for members, tell -> the dict of `attack`."""
    from jax_privacy import auditing  # takes seconds to import

    auditor = auditing.CanaryScoreAuditor(members, others)
    rates = {f"tpr_at_{rate:g}": float(auditor.tpr_at_given_fpr(rate)) for rate in (1e-3, 1e-2)}
    return rates | {"auc": float(auditor.attack_auroc()), "members": len(members), "others": len(others)}


def _tables(config):
    """The run's Objective, and (members, others) as tokens."""
    if config.privacy.by_unit:
        raise InputError("--membership tells whether a row was trained on: leave out --privacy_unit and --unit_rows.")
    corpus, shares = dealing.load(config)
    if corpus.test is None:
        raise InputError("--membership needs records outside the training: a test set, or --test_fraction.")
    objective = objectives.make(config, corpus.task, models.load_tokenizer(config.base.name))
    train, test = objective.train(corpus.train), objective.train(corpus.test)
    members = np.concatenate(shares)
    return objective, ({name: value[members] for name, value in train.items()}, test)


def _losses(loss, model, params, adapter, table):
    """Each row's loss [N]; with no adapter, the base model's."""
    one = jax.jit(lambda params, adapter, batch: loss(model, params)(adapter, batch))
    chunks = [np.asarray(one(params, adapter, chunk)) for chunk in evaluation.padded_batches(table, ROWS)]
    return np.concatenate(chunks)[: len(table["input_ids"])]
