"""Membership inference against a finished adapter: does a record's loss tell that it was trained on?"""

import dataclasses
import os

import jax
import numpy as np

from dplora_jax import evaluation, models
from dplora_jax.config import field_value, replace
from dplora_jax.errors import InputError
from dplora_jax.federation import final_adapter, trust_modes, unsaved
from dplora_jax.finetuning import dealing, objectives, setup
from dplora_jax.privacy import secrets
from experiments import canaries

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
    prepared = setup.prepare(replace(config, eval_every=config.execution.eval_every or 1))
    trained = _train(config, prepared, seed)
    aim, tables = _tables(config)
    full = dataclasses.replace(prepared.model, start=0)
    before, after = (
        [_losses(aim.loss, full, prepared.params, adapter, table) for table in tables] for adapter in (None, trained)
    )
    members, others = (x - y for x, y in zip(before, after, strict=True))
    return rates(members, others)


def rates(members, others):
    """What scores [N], higher for members, tell -> the dict of `attack`."""
    from jax_privacy import auditing  # takes seconds to import

    auditor = auditing.CanaryScoreAuditor(members, others)
    found = {f"tpr_at_{rate:g}": float(auditor.tpr_at_given_fpr(rate)) for rate in (1e-3, 1e-2)}
    return found | {"auc": float(auditor.attack_auroc()), "members": len(members), "others": len(others)}


def _train(config, prepared, seed):
    """The adapter that the run releases."""
    count = trust_modes.mode(config).parties(config)
    held = [os.urandom(32) for _ in range(count)] if seed is None else secrets.from_seed(seed, count)
    return final_adapter.adapter(config, unsaved.train(config, prepared, held))


def _tables(config):
    """The run's Objective, and (members, others) as tokens."""
    corpus, shares = dealing.load(config)
    if corpus.test is None:
        raise InputError("--membership needs records outside the training: a test set, or --test_fraction.")
    aim = objectives.make(config, corpus.task, models.load_tokenizer(config.base.name))
    train, test = aim.train(corpus.train), aim.train(corpus.test)
    held = np.concatenate(shares)
    return aim, ({name: value[held] for name, value in train.items()}, test)


def _losses(loss, model, params, adapter, table):
    """Each row's loss [N]; with no adapter, the base model's."""
    one = jax.jit(lambda params, adapter, batch: loss(model, params)(adapter, batch))
    chunks = [np.asarray(one(params, adapter, chunk)) for chunk in evaluation.padded_batches(table, ROWS)]
    return np.concatenate(chunks)[: len(table["input_ids"])]
