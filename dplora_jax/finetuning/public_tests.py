"""What a run is measured by: its task's metrics on the public test set, and other public tasks before and after."""

import pathlib

import numpy as np

from dplora_jax import evaluation, losses
from dplora_jax.data import encoding, partition, records, sources, tables, tasks
from dplora_jax.errors import InputError
from dplora_jax.finetuning import objectives

SENTENCE = "The bank said that profit rose in the first quarter, and the patient recovered within 3 days."
STEP = 32  # lengths of benchmarks are rounded up to a multiple of it


def evaluator(config, objective, corpus, private, tokenizer, test, prepared):
    """A function (adapter, residual, ends) -> public metrics of a run's `preparation.Prepared`; with `ends`, which is for the
    first and the last, those too that take longer: written answers, and `benchmarks`. `test` is `objective.test(corpus.test)`.
    `private` is a list of Records, those of each client that this process trains for: no public task may hold them all, or one
    client's."""
    model, params, grid = prepared.model, prepared.params, prepared.mesh
    rows = None if test is None else prepared.through_frozen_layers(test)
    regular = _regular(config, objective, model, params, grid, rows)
    closing = _closing(config, objective, corpus, private, prepared.whole_model, params, grid, tokenizer)

    def evaluate(adapter, residual, ends=False):
        metrics = regular(adapter, residual)
        for prefix, measure in closing.items() if ends else ():
            metrics |= {prefix + name: value for name, value in measure(adapter, residual).items()}
        return metrics

    return evaluate


def probe(config, classifies, tokenizer, prepared):
    """A function (adapter, residual, ends) -> metrics on a public sentence, for a run that is evaluated on nothing else. They
    tell no more than whether the logits are finite."""
    model, params, grid = prepared.whole_model, prepared.params, prepared.mesh
    if classifies:
        one = records.Records((SENTENCE,), np.zeros(1, np.int32))
        table = encoding.classification(tokenizer, one, config.data.max_length)
        measure = evaluation.classifier(model, grid, params, table)
    else:
        table = encoding.right_answers(tokenizer, [tasks.Asked(("",), (SENTENCE,))], config.data.max_length)
        measure = evaluation.perplexity(model, grid, params, table)
    return lambda adapter, residual, ends=False: measure(adapter, residual)


def _regular(config, objective, model, params, grid, test):
    if test is None and config.private_test.share:
        return lambda adapter, residual: {}
    if test is None:
        raise InputError(
            "there is no public test set to evaluate on: give `test_data`, `private_test` for noisy scores on a part of the "
            "clients' own records, or eval_every=0."
        )
    if "labels" in test:
        return evaluation.classifier(losses.reader(objective.loss, model, params), grid, params, test)
    return evaluation.perplexity(model, grid, params, test)


def _closing(config, objective, corpus, private, model, params, grid, tokenizer):
    """{what its metrics' names begin with: evaluation} of what is measured at both ends alone."""
    evaluations = {}
    if objective.kind != objectives.LANGUAGE_MODEL:
        if config.evaluation.benchmarks:
            raise InputError("`benchmarks` needs a language model, and this is a classifier: leave it out.")
        return evaluations
    if corpus.task.kind == tasks.ANSWERS and config.evaluation.generate and corpus.test is not None:
        asked = _some(config, tasks.asked(corpus.task, corpus.test, config.data.chat))
        _check_room(config, model)
        evaluations[""] = evaluation.answers(
            model, params, tokenizer, asked, config.data.max_length, config.evaluation.new_tokens, config.data.chat
        )
    for name in config.evaluation.benchmarks:
        asked = _asked(config, corpus, private, name)
        evaluations |= {
            f"{name}_{part}": evaluate
            for part, evaluate in _benchmark(config, name, asked, model, params, grid, tokenizer)
        }
    return evaluations


def _asked(config, corpus, private, name):
    """The records of a public task as they are asked; of the run's own task, the run's own test set."""
    chat = config.data.chat and sources.known(name).kind == tasks.ANSWERS
    if name == config.data.dataset:
        if corpus.test is None:
            raise InputError(
                f"benchmarks={name} is the run's own task, of which there is no public test set: leave it out."
            )
        some = records.some(corpus.test, config.evaluation.benchmark_records, config.schedule.split_seed)
        return tasks.asked(corpus.task, some, chat)
    folder = config.evaluation.benchmarks_dir and pathlib.Path(config.evaluation.benchmarks_dir) / name
    if folder and not folder.is_dir():
        raise InputError(
            f"benchmarks={name} needs the folder {folder}, which does not exist; without `benchmarks_dir` it is read from "
            "the hub."
        )
    private_folder = config.data.data_dir and pathlib.Path(config.data.data_dir).resolve()
    if folder and private_folder in (
        (folder.resolve(), *folder.resolve().parents)
        if config.data.partition == partition.FOLDERS
        else (folder.resolve(),)
    ):
        raise InputError(
            f"benchmarks={name} would be read from `data_dir`, where the private table lies: give another folder."
        )
    at = str(folder) if folder else None
    form = tables.text_format(config.data.encoding, config.data.separator)
    return sources.benchmark(
        name, at, config.evaluation.benchmark_records, config.schedule.split_seed, private, chat, form
    )


def _benchmark(config, name, asked, model, params, grid, tokenizer):
    """(what the metrics' names go on with, evaluation) of one public task; its rows are as long as its longest needs."""
    kind = tasks.TASKS[name].kind
    chat = config.data.chat and kind == tasks.ANSWERS
    _, longest = encoding.most_tokens(tokenizer, asked, chat)
    length = min(-(-longest // STEP) * STEP, model.config.max_positions)
    if kind in (tasks.CHOICES, tasks.LABELS):
        table = encoding.all_answers(tokenizer, asked, length)
        yield "", evaluation.choices(model, grid, params, table, asked)
        return
    length = min(length, config.data.max_length)
    yield (
        "",
        evaluation.perplexity(
            model, grid, params, encoding.right_answers(tokenizer, asked, length, kind == tasks.ANSWERS, chat)
        ),
    )
    if kind == tasks.ANSWERS and config.evaluation.generate:
        _check_room(config, model)
        yield (
            "written_",
            evaluation.answers(
                model, params, tokenizer, _some(config, asked), length, config.evaluation.new_tokens, chat
            ),
        )


def _some(config, asked):
    """`generate` of `asked`, drawn by `split_seed`: a table may be sorted by where its rows are from."""
    chosen = np.random.default_rng(config.schedule.split_seed).permutation(len(asked))[: config.evaluation.generate]
    return [asked[i] for i in np.sort(chosen)]


def _check_room(config, model):
    most = model.config.max_positions
    if config.data.max_length + config.evaluation.new_tokens > most:
        raise InputError(
            f"max_length={config.data.max_length} and new_tokens={config.evaluation.new_tokens} together exceed the model's "
            f"{most} positions: lower one of them."
        )
