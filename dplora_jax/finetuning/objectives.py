"""What a run trains for: a classifier's labels, or the answers of a language model; and the arrays and the loss of either."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dplora_jax import losses
from dplora_jax.data import encoding, records, tasks
from dplora_jax.errors import InputError
from dplora_jax.models import pretrained

AUTO, CLASSIFIER, LANGUAGE_MODEL = "auto", "classifier", "language_model"


class Objective(NamedTuple):
    """How records become arrays (`train` for the loss, `test` for the metrics), and the loss of a model on them."""

    kind: str
    train: Callable
    test: Callable
    loss: Callable  # (model, params) -> losses.ModelLoss
    words: tuple = ()  # of a language model that says a label: the token of each
    blank: Any = None  # and the row that asks for one without a text


def kind(config, task):
    """CLASSIFIER or LANGUAGE_MODEL, for `config` on `task`: as `objective` says; `auto` classifies by encoders alone.

    Raises InputError where the task has no labels for a classifier, or the model does not read from left to right.
    """
    chosen = config.data.objective
    if config.data.chat and task.kind == tasks.TEXT:
        raise InputError(f"`chat` needs prompts, and dataset={config.data.dataset} has none: leave it out.")
    bidirectional = pretrained.bidirectional(config.base.name)
    if chosen == AUTO:
        chosen = CLASSIFIER if bidirectional or config.lora.head_only else LANGUAGE_MODEL
    if chosen == CLASSIFIER and task.kind != tasks.LABELS:
        raise InputError(
            f"dataset={config.data.dataset} has no labels to classify by: give `label_column`, or a language model "
            "(model=SmolLM2-135M-Instruct, say) instead of an encoder, objective=classifier or `head_only`."
        )
    if chosen == LANGUAGE_MODEL and (bidirectional or config.lora.head_only):
        raise InputError(
            "objective=language_model needs a model that reads from left to right, and no `head_only`: an encoder predicts no "
            "next token, and a language model has no head of its own."
        )
    return chosen


def make(config, task, tokenizer):
    """The Objective of `config` on `task`."""
    documents = config.privacy.unit_rows if cuts_texts(config) else 1
    if kind(config, task) == CLASSIFIER:
        arrays = functools.partial(
            encoding.classification, tokenizer, max_length=config.data.max_length, most_rows=documents
        )
        return Objective(CLASSIFIER, _with_units(arrays), arrays, losses.classification)
    if documents > 1 and task.kind != tasks.TEXT:
        raise InputError(
            f"unit_rows={documents} cuts long texts, and dataset={config.data.dataset} has prompts before its answers: give "
            "unit_rows=1, or `privacy_unit`."
        )

    def rows(encode, **options):
        return lambda table: encode(
            tokenizer,
            tasks.asked(task, table, config.data.chat),
            config.data.max_length,
            chat=config.data.chat,
            **options,
        )

    def in_rows(table):
        return encoding.documents(tokenizer, tasks.asked(task, table), config.data.max_length, documents)

    if task.kind == tasks.LABELS:
        return _label_words(config, task, tokenizer, rows)
    right = rows(encoding.right_answers, ends=task.kind == tasks.ANSWERS) if documents == 1 else in_rows
    return Objective(LANGUAGE_MODEL, _with_units(right), right, losses.language_model)


def _label_words(config, task, tokenizer, rows):
    """The Objective of a language model that says a label by the token behind a prompt; `rows` as in `make`."""
    most, chat, blank = config.data.max_length, config.data.chat, task.ask({"text": "", "label": 0})
    shared, words = encoding.label_words(tokenizer, blank, chat)
    _, least = encoding.most_tokens(tokenizer, [blank], chat)
    if least > most:
        raise InputError(
            f"max_length={most} leaves no room for a text: a prompt without text has {least} tokens. Raise it."
        )
    prompts = rows(encoding.questions, shared=shared)
    empty = encoding.questions(tokenizer, [blank], most, shared, chat)
    return Objective(LANGUAGE_MODEL, _with_units(prompts), prompts, losses.label_words(words), words, empty)


def cuts_texts(config):
    """Whether a text that is longer than a row goes on in others."""
    return config.privacy.by_unit and config.privacy.unit_column is None


def _with_units(arrays):
    """`arrays(table)` of Records with `unit` [N], the number of each row's unit, where records have units."""

    def made(table):
        if table.units is None:
            return arrays(table)
        return arrays(table) | {records.UNIT: np.unique(table.units, return_inverse=True)[1].astype(np.int32)}

    return made
