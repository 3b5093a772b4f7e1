"""What a run is measured by: its task's metrics on the public test set, and other public tasks before and after."""

import dataclasses
import pathlib

import numpy as np

from dplora_jax import evaluation
from dplora_jax.data import encoding, records, sources, tables, tasks
from dplora_jax.errors import InputError
from dplora_jax.federation import final_adapter
from dplora_jax.finetuning import objectives

STEP = 32  # lengths of benchmarks are rounded up to a multiple of it


def evaluator(config, aim, corpus, private, sizes, model, params, grid, tokenizer, test):
    """A function (state, ends=False) -> the public metrics of a `round.State`; with `ends`, which is for the first and the last,
    those too that take longer: written answers, and `benchmarks`. `test` is `aim.test(corpus.test)`, through the frozen layers
    where these are run once. `private` is a list of Records, those of each client that this process trains for:
    no public task may hold them all, or one client's."""
    whole = dataclasses.replace(model, start=0)
    regular = _regular(aim, corpus, model, params, grid, test)
    closing = _closing(config, aim, corpus, private, whole, params, grid, tokenizer)

    def evaluate(state, ends=False):
        found = final_adapter.metrics(config, sizes, regular, state)
        for prefix, of in closing.items() if ends else ():
            found |= {prefix + name: value for name, value in final_adapter.metrics(config, sizes, of, state).items()}
        return found

    return evaluate


def _regular(aim, corpus, model, params, grid, test):
    if test is None:
        raise InputError("there is no public test set to evaluate on: give `test_data`, or eval_every=0.")
    if aim.kind == objectives.CLASSIFIER:
        return evaluation.classifier(model, grid, params, test)
    if corpus.task.kind == tasks.LABELS:
        labels = np.asarray(corpus.test.labels)
        return evaluation.label_words(model, grid, params, test, labels, len(corpus.label_names))
    return evaluation.perplexity(model, grid, params, test)


def _closing(config, aim, corpus, private, model, params, grid, tokenizer):
    """{what its metrics' names begin with: evaluation} of what is measured at both ends alone."""
    found = {}
    if aim.kind != objectives.LANGUAGE_MODEL:
        if config.evaluation.benchmarks:
            raise InputError("`benchmarks` asks a language model, and this is a classifier: leave it out.")
        return found
    if corpus.task.kind == tasks.ANSWERS and config.evaluation.generate:
        asked = _some(config, tasks.asked(corpus.task, corpus.test, config.data.chat))
        _check_room(config, model)
        found[""] = evaluation.answers(
            model, params, tokenizer, asked, config.data.max_length, config.evaluation.new_tokens, config.data.chat
        )
    for name in config.evaluation.benchmarks:
        asked = _asked(config, corpus, private, name)
        found |= {f"{name}_{part}": of for part, of in _benchmark(config, name, asked, model, params, grid, tokenizer)}
    return found


def _asked(config, corpus, private, name):
    """The records of a public task as they are asked; of the run's own task, the run's own test set."""
    chat = config.data.chat and sources.known(name).kind == tasks.ANSWERS
    if name == config.data.dataset:
        some = records.some(corpus.test, config.evaluation.benchmark_records, config.schedule.split_seed)
        return tasks.asked(corpus.task, some, chat)
    folder = config.evaluation.benchmarks_dir and pathlib.Path(config.evaluation.benchmarks_dir) / name
    if folder and not folder.is_dir():
        raise InputError(
            f"benchmarks={name} wants a folder {folder}, which is not there; without `benchmarks_dir` it is read from the hub."
        )
    own = config.data.data_dir and pathlib.Path(config.data.data_dir).resolve()
    if folder and own in (
        (folder.resolve(), *folder.resolve().parents) if config.data.partition == "folders" else (folder.resolve(),)
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
            f"max_length={config.data.max_length} and new_tokens={config.evaluation.new_tokens} are more than the model's {most} positions."
        )
