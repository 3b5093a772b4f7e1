"""Metrics of an adapter on public test sets, computed over the whole mesh.

Letters: N rows, I records, T tokens.
"""

import functools
import itertools
import math

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dplora_jax import generation, lora, losses
from dplora_jax.data import encoding, records, scores
from dplora_jax.federation.aggregation import CLIENTS
from dplora_jax.federation.mesh import put
from dplora_jax.models import tokenizer as tokenizers
from dplora_jax.models import tokenizer_settings

ROWS, TOKENS = 256, 16384  # of a batch on one device, at most
UNDECIDED = -1  # the label of a row whose logits are not finite
PROMPTS = 16  # answered at a time


def padded_batches(table, size):
    """The rows of `table` (dict of [N, ...] arrays) as dicts of [size, ...] arrays, the last one filled up with zeros."""
    count = len(next(iter(table.values())))
    for start in range(0, count, size):
        rows = {name: value[start : start + size] for name, value in table.items()}
        yield {
            name: np.pad(value, [(0, size - len(value)), *[(0, 0)] * (value.ndim - 1)]) for name, value in rows.items()
        }


def classifier(model, mesh, params, test):
    """A function (adapter, residual=()) -> {"accuracy", "macro_f1"} over `test` (dict of [N, ...] arrays with `labels`); both are
    nan where any logit is not finite, since argmax takes what is not a number for a label.

    A residual is a change of the base's kernels (`lora.shifted`). `params` lie on the mesh already; the test's rows are split
    over the clients axis, and compiled once; every process gets all predictions. Where a record has several rows (`unit` [N]
    numbers each row's), its label is the likeliest of all of them together.
    """
    inputs = {name: value for name, value in test.items() if name not in ("labels", records.UNIT)}
    first_rows = firsts(test)
    labels = test["labels"][first_rows]
    by_row = _over_rows(model, mesh, params, inputs, functools.partial(label_likelihoods, model))

    def evaluate(adapter, residual=()):
        predicted = label_said(by_row(adapter, residual), first_rows)
        if (predicted == UNDECIDED).any():
            return dict.fromkeys(("accuracy", "macro_f1"), math.nan)
        macro_f1 = scores.macro_f1(predicted, labels, model.config.num_labels)
        return {"accuracy": scores.accuracy(predicted, labels), "macro_f1": macro_f1}

    return evaluate


def label_likelihoods(model, params, adapter, batch):
    """The log-likelihood that a classifier gives each label of each row, [B, num_labels]."""
    return jax.nn.log_softmax(model.apply(params, batch, adapter))


def label_said(by_row, first_rows):
    """The label that a classifier says of each record, int [I]: the likeliest by the sum over its rows of `label_likelihoods`
    [N, num_labels], a record's rows standing side by side from its first on (`firsts`); UNDECIDED where one is not finite."""
    by_record = np.add.reduceat(by_row, first_rows)
    return np.where(np.isfinite(by_record).all(-1), by_record.argmax(-1), UNDECIDED)


def firsts(table):
    """The first row of each record of `table`, whose rows stand side by side; each row is one without `unit`."""
    count = len(next(iter(table.values())))
    if records.UNIT not in table:
        return np.arange(count)
    return np.flatnonzero(np.diff(table[records.UNIT], prepend=-1))


def on(test):
    """What `Federation.fit` takes as `evaluate`: accuracy and macro-F1 on the public rows `test` (a dict of [N, ...] arrays)
    where they have `labels`, else perplexity over the tokens that `loss_mask` marks."""

    def measure(prepared):
        rows = prepared.through_frozen_layers(test)
        if "labels" in test:
            reader = losses.reader(prepared.rounds.loss, prepared.model, prepared.params)
            evaluate = classifier(reader, prepared.mesh, prepared.params, rows)
        else:
            evaluate = perplexity(prepared.model, prepared.mesh, prepared.params, rows)
        return lambda adapter, residual=(), ends=False: evaluate(adapter, residual)

    return measure


def likelihoods(model, mesh, params, table):
    """A function (adapter, residual=()) -> [N] float64: the log-likelihood, in nats, of the tokens that `loss_mask` marks in each
    row of `table` (dict of [N, T] arrays; `encoding.right_answers`). As `classifier` otherwise."""
    counted = table["loss_mask"][:, 1:].sum(1)
    bound = max(1, int(counted.max(initial=0)))

    def mean(based, adapter, batch):
        return losses.language_model(model, based, bound)(adapter, batch)

    loss = _over_rows(model, mesh, params, table, mean)
    return lambda adapter, residual=(): -loss(adapter, residual).astype(np.float64) * counted


def perplexity(model, mesh, params, table):
    """A function (adapter, residual=()) -> {"perplexity"}: exp of the mean loss of a token, over all marked tokens of `table`."""
    counted, measure = int(table["loss_mask"][:, 1:].sum()), likelihoods(model, mesh, params, table)

    def evaluate(adapter, residual=()):
        with np.errstate(over="ignore"):  # then it is infinite
            return {"perplexity": float(np.exp(-measure(adapter, residual).sum() / max(1, counted)))}

    return evaluate


def choices(model, mesh, params, table, asked):
    """A function (adapter, residual=()) -> {"accuracy", "accuracy_norm"}: how often the likeliest answer of each of `asked` is
    the right one, by its likelihood and by that over its length in characters, as EleutherAI's evaluation harness has `acc`
    and `acc_norm`. `table` is `encoding.all_answers` of `asked`."""
    measure, ends = likelihoods(model, mesh, params, table), np.cumsum([len(one.answers) for one in asked])[:-1]
    lengths = np.array([len(answer.removeprefix(" ")) for one in asked for answer in one.answers], float)
    right = np.array([one.right for one in asked])

    def evaluate(adapter, residual=()):
        nats = measure(adapter, residual)
        if not np.isfinite(nats).all():
            return dict.fromkeys(("accuracy", "accuracy_norm"), math.nan)
        best = [np.array([part.argmax() for part in np.split(x, ends)]) for x in (nats, nats / np.maximum(lengths, 1))]
        return {name: scores.accuracy(p, right) for name, p in zip(("accuracy", "accuracy_norm"), best, strict=True)}

    return evaluate


def answers(model, params, tokenizer, asked, max_length, new_tokens, chat=False):
    """A function (adapter, residual=()) -> {"token_f1", "rouge_l"}: means over `asked` of what greedy answers of up to
    `new_tokens` tokens have in common with the right ones, cut to as many. Prompts are cut to `max_length` tokens."""
    table = encoding.prompts(tokenizer, asked, max_length, chat)
    references = [_cut(tokenizer, one.answers[one.right], new_tokens) for one in asked]
    ends, pad = tokenizer_settings.end_ids(tokenizer), tokenizer.pad_token_id

    def evaluate(adapter, residual=()):
        based = lora.shifted(model, params, residual) if residual else params
        batches = [
            np.asarray(
                generation.generate(
                    model, based, batch, max_new_tokens=new_tokens, adapter=adapter, end_tokens=ends, pad_token=pad
                )
            )
            for batch in padded_batches(table, min(PROMPTS, len(asked)))
        ]
        written = tokenizer.batch_decode(
            [
                list(itertools.takewhile(lambda token: token not in ends, ids.tolist()))
                for ids in np.concatenate(batches)[: len(asked)]
            ],
            skip_special_tokens=True,
        )
        pairs = list(zip(written, references, strict=True))
        return {name: float(np.mean([score(*pair) for pair in pairs])) for name, score in ANSWER_SCORES.items()}

    return evaluate


ANSWER_SCORES = {"token_f1": scores.token_f1, "rouge_l": scores.rouge_l}


def _cut(tokenizer, text, tokens):
    return tokenizer.decode(tokenizers.tokens(tokenizer, text, add_special_tokens=False).input_ids[:tokens])


def _over_rows(model, mesh, params, table, compute):
    """A function (adapter, residual) -> [N, ...]: `compute(params, adapter, batch)` of the rows of `table`, on the whole mesh."""
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(CLIENTS), PartitionSpec()))
    count, devices = len(next(iter(table.values()))), mesh.shape[CLIENTS]
    most = max(1, min(ROWS, TOKENS // table["attention_mask"].shape[1]))
    batches = [put(batch, split) for batch in padded_batches(table, devices * min(most, -(-count // devices)))]

    @functools.partial(jax.jit, out_shardings=whole)
    def one(params, adapter, residual, batch):
        return compute(lora.shifted(model, params, residual) if residual else params, adapter, batch)

    def all_rows(adapter, residual=()):
        losses = [one(params, adapter, residual, batch) for batch in batches]
        return np.concatenate([np.asarray(rows) for rows in losses])[:count]

    return all_rows
