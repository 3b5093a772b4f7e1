"""From a RunConfig to a Federation and its records; every mistake of a user's stops here, before any training."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dplora_jax import models
from dplora_jax.data import encoding, records
from dplora_jax.federation import finite, processes
from dplora_jax.federation.clock import Clock
from dplora_jax.federation.federation import Federation
from dplora_jax.finetuning import dealing, objectives, public_tests, public_text, warm_start
from dplora_jax.models import features, pretrained


class FineTuning(NamedTuple):
    """A federation with what it is fitted on: `federation.fit(shards, workdir, evaluate=..., probe=..., describe=...,
    start=...)`."""

    federation: Federation
    shards: list  # {name: [n_k, ...]} of each client; None for those that another process holds
    evaluate: Callable
    probe: Callable | None  # in its place, where nothing public is evaluated on
    describe: Callable
    start: Callable | None  # where public records are trained on first
    corpus: Any
    tokenizer: Any

    def fit(self, workdir=None, **options):
        """`Federation.fit` of these records, evaluated as the configuration says."""
        given = {name: getattr(self, name) for name in ("evaluate", "probe", "describe", "start")}
        return self.federation.fit(self.shards, workdir, **given, **options)


class Base(NamedTuple):
    """The base model of a run and what is public of its task: `test` holds the rows of the public test set, where they are
    needed, and `labels` the names of a classifier's labels, else None."""

    model: Any
    params: Any
    tokenizer: Any
    objective: objectives.Objective
    corpus: Any
    test: Any
    labels: Any


def prepare(config, stored=None, memo=None, dealt=None, programs=None, command="", clock=None):
    """Read and check everything -> FineTuning. `stored` is the config.json of a run that was charged already; `memo` and
    `programs`, dicts, carry what the frozen layers made of a table, and compiled rounds, to the next call; `dealt` stands in
    for the records that the fields name, and `clock` (a `clock.Clock`) learns where time goes. Raises InputError."""
    processes.at("reading the base model and the records")
    dealt = dealt or dealing.deal(config)
    base = read_base(config, dealt.corpus, stored, memo, clock)
    model, params, tokenizer, objective, corpus, test, labels = base
    evaluated = config.execution.eval_every and (test is not None or not config.private_test.share)
    federation = Federation(
        model,
        params,
        objective.loss,
        config,
        base_name=pretrained.hub_id(config.base.name),
        programs=programs,
        memo=memo,
        clock=clock,
    )
    # No other client's text is looked at.
    table, shares = dealt.read(federation.local_clients(config.data.max_length))
    train = objective.train(table)
    if objectives.cuts_texts(config):  # from a client's records to their rows
        rows = {k: np.flatnonzero(np.isin(train[records.UNIT], share)) for k, share in shares.items()}
    else:
        rows = shares
    shards = [
        {name: array[rows[k]] for name, array in train.items()} if k in rows else None
        for k in range(config.schedule.clients)
    ]
    private = dealing.by_client(table, shares)
    evaluate = functools.partial(
        public_tests.evaluator, config, objective, corpus, private, tokenizer, test if evaluated else None
    )
    probe = None if evaluated else functools.partial(public_tests.probe, config, labels is not None, tokenizer)
    public = warm_start.read(config, corpus, private)
    describe = functools.partial(_described, config, base, command, public)
    start = public and functools.partial(warm_start.trained, config, objective, public, memo)
    return FineTuning(federation, shards, evaluate, probe, describe, start, corpus, tokenizer)


def read_base(config, corpus, stored=None, memo=None, clock=None):
    """Read and check the base model for the task of `corpus` -> Base; no private record is looked at. `stored`, `memo` and
    `clock` as for `prepare`. Raises InputError."""
    classifies = objectives.kind(config, corpus.task) == objectives.CLASSIFIER
    labels = corpus.label_names if classifies else None
    name, dtype, quantize = config.base.name, config.base.dtype, config.base.quantize
    model, params = models.from_pretrained(name, dtype, None, quantize, labels)
    if config.base.remat:
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, remat=True))
    tokenizer = models.load_tokenizer(name)
    encoding.check_length(config.data.max_length, model, tokenizer)
    encoding.check_ids(model, tokenizer)
    finite.check_weights(name, params)
    objective = objectives.make(config, corpus.task, tokenizer)
    wanted = config.execution.eval_every or config.base.feature_norm or config.lora.core or objective.words
    test = objective.test(corpus.test) if wanted and corpus.test else None
    with (clock or Clock()).part("public text"):
        params = public_text.with_measured(config, model, params, objective, test, memo, stored)
    return Base(model, params, tokenizer, objective, corpus, test, labels)


def _described(config, base, command, public, prepared):
    return describe(config, base, sum(prepared.sizes), command, public)


def describe(config, base, train_records, command, public=None):
    """What config.json says beyond the federation itself, of a Base, of how many records all clients have, and of the `public`
    records that were trained on first, where they were read here."""
    corpus, labels, params = base.corpus, base.labels, base.params
    described = {
        "data": {
            "description": corpus.description,
            "synthetic": corpus.synthetic,
            "train_records": train_records,
            "test_records": len(corpus.test.texts) if corpus.test else 0,
            "labels": list(corpus.label_names),
            "commonest_label": _commonest(corpus),
        },
        "base_files": models.file_digests(config.base.name),
        "method": [],
        "command": command,
    }
    if public_text.centres(config, params):
        described["method"].append(
            f"the head's features centred, and scaled to norm {public_text.norm(config):g}, by public text, its labels unused: "
            f"the test set that the metrics are of, or the embedded {public_text.STAND_IN} where that has fewer than "
            f"{public_text.ENOUGH} records"
        )
    if labels is not None and (start := pretrained.head_start(config.base.name, labels)):
        described["method"].append(start)
    if config.lora.core:
        described["method"].append(
            "the core's A and B from the text of the public test set that the metrics are of (its labels unused): the "
            "directions that tell its texts apart, centred and whitened"
        )
    if base.objective.words:
        described["label_reading"] = _label_reading(base)
        described["method"].append(described["label_reading"])
    described["method"] += warm_start.words(config, public)
    if (measured := public_text.said(params)) is not None:
        described[features.KEY] = measured
    return described


def _label_reading(base):
    """How the labels of a language model are read, in words: a person who has the adapter alone needs the numbers."""
    prompt = base.corpus.task.ask({"text": "TEXT", "label": 0}).prompts[0]
    tokens = base.tokenizer.convert_ids_to_tokens(base.objective.words)
    bias = np.asarray(base.params[features.KEY]["bias"]).tolist()
    three = zip(tokens, base.corpus.label_names, bias, strict=True)
    each = ", ".join(f"{token} ({name}) less {taken_off:.4g}" for token, name, taken_off in three)
    return (
        f"a label said by the token behind the prompt {prompt!r}: the largest of the logits of {each}; what is taken off is the "
        "token's mean log-probability among these on the texts of the public test set, its labels unused, or, where there was "
        "none, behind a prompt without a text"
    )


def _commonest(corpus):
    """The accuracy on the public test set of saying its commonest label each time; None where there are no labels, or no test."""
    if not corpus.label_names or corpus.test is None:
        return None
    return float(np.bincount(corpus.test.labels).max() / len(corpus.test.labels))
