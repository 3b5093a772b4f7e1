"""What a run is measured by: its task's metrics on the public test set, and other public tasks before and after."""

import dataclasses
import pathlib

import numpy as np

from dplora_jax import evaluation
from dplora_jax.data import encoding, records, sources, tables, tasks
from dplora_jax.errors import InputError
from experiments import objective, released

STEP = 32  # lengths of benchmarks are rounded up to a multiple of it


def evaluator(config, aim, corpus, private, sizes, model, params, grid, tokenizer, test):
    """A function (state, ends=False) -> the public metrics of a `round.State`; with `ends`, which is for the first and the last,
    those too that take longer: written answers, and --benchmarks. `test` is `aim.test(corpus.test)`, through the frozen layers
    where these are run once. `private` is a list of Records, those of each client that this process trains for:
    no public task may hold them all, or one client's."""
    whole = dataclasses.replace(model, start=0)
    regular = _regular(aim, corpus, model, params, grid, test)
    closing = _closing(config, aim, corpus, private, whole, params, grid, tokenizer)

    def evaluate(state, ends=False):
        found = released.metrics(config, sizes, regular, state)
        for prefix, of in closing.items() if ends else ():
            found |= {prefix + name: value for name, value in released.metrics(config, sizes, of, state).items()}
        return found

    return evaluate


def _regular(aim, corpus, model, params, grid, test):
    if test is None:
        raise InputError("there is no public test set to evaluate on: give --test_data, or --eval_every=0.")
    if aim.kind == objective.CLASSIFIER:
        return evaluation.classifier(model, grid, params, test)
    if corpus.task.kind == tasks.LABELS:
        labels = np.asarray(corpus.test.labels)
        return evaluation.label_words(model, grid, params, test, labels, len(corpus.label_names))
    return evaluation.perplexity(model, grid, params, test)


def _closing(config, aim, corpus, private, model, params, grid, tokenizer):
    """{what its metrics' names begin with: evaluation} of what is measured at both ends alone."""
    found = {}
    if aim.kind != objective.LANGUAGE_MODEL:
        if config.benchmark_list:
            raise InputError("--benchmarks asks a language model, and this is a classifier: leave it out.")
        return found
    if corpus.task.kind == tasks.ANSWERS and config.generate:
        asked = _some(config, tasks.asked(corpus.task, corpus.test, config.chat))
        _check_room(config, model)
        found[""] = evaluation.answers(
            model, params, tokenizer, asked, config.max_length, config.new_tokens, config.chat
        )
    for name in config.benchmark_list:
        asked = _asked(config, corpus, private, name)
        found |= {f"{name}_{part}": of for part, of in _benchmark(config, name, asked, model, params, grid, tokenizer)}
    return found


def _asked(config, corpus, private, name):
    """The records of a public task as they are asked; of the run's own task, the run's own test set."""
    chat = config.chat and sources.known(name).kind == tasks.ANSWERS
    if name == config.dataset:
        some = records.some(corpus.test, config.benchmark_records, config.split_seed)
        return tasks.asked(corpus.task, some, chat)
    folder = config.benchmarks_dir and pathlib.Path(config.benchmarks_dir) / name
    if folder and not folder.is_dir():
        raise InputError(
            f"--benchmarks={name} wants a folder {folder}, which is not there; without --benchmarks_dir it is read from the hub."
        )
    own = config.data_dir and pathlib.Path(config.data_dir).resolve()
    if folder and own in (
        (folder.resolve(), *folder.resolve().parents) if config.partition == "folders" else (folder.resolve(),)
    ):
        raise InputError(
            f"--benchmarks={name} would be read from --data_dir, where the private table lies: give another folder."
        )
    at = str(folder) if folder else None
    form = tables.text_format(config.encoding, config.separator)
    return sources.benchmark(name, at, config.benchmark_records, config.split_seed, private, chat, form)


def _benchmark(config, name, asked, model, params, grid, tokenizer):
    """(what the metrics' names go on with, evaluation) of one public task; its rows are as long as its longest needs."""
    kind = tasks.TASKS[name].kind
    chat = config.chat and kind == tasks.ANSWERS
    _, longest = encoding.most_tokens(tokenizer, asked, chat)
    length = min(-(-longest // STEP) * STEP, model.config.max_positions)
    if kind in (tasks.CHOICES, tasks.LABELS):
        table = encoding.all_answers(tokenizer, asked, length)
        yield "", evaluation.choices(model, grid, params, table, asked)
        return
    length = min(length, config.max_length)
    yield (
        "",
        evaluation.perplexity(
            model, grid, params, encoding.right_answers(tokenizer, asked, length, kind == tasks.ANSWERS, chat)
        ),
    )
    if kind == tasks.ANSWERS and config.generate:
        _check_room(config, model)
        yield (
            "written_",
            evaluation.answers(model, params, tokenizer, _some(config, asked), length, config.new_tokens, chat),
        )


def _some(config, asked):
    """--generate of `asked`, drawn by --split_seed: a table may be sorted by where its rows are from."""
    chosen = np.random.default_rng(config.split_seed).permutation(len(asked))[: config.generate]
    return [asked[i] for i in np.sort(chosen)]


def _check_room(config, model):
    most = model.config.max_positions
    if config.max_length + config.new_tokens > most:
        raise InputError(
            f"--max_length={config.max_length} and --new_tokens={config.new_tokens} are more than the model's {most} positions."
        )
