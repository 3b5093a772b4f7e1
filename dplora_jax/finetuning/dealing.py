"""The records that a configuration names, dealt to its clients; no model and no JAX."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dplora_jax.data import folders, partition, records, sources


class Dealt(NamedTuple):
    """Who has which records: what is public of them (`corpus`; its `train` is the whole table, where that was read to be dealt),
    and `read`: numbers of clients -> (their Records, {client: its indices into those}), which raises InputError where the public
    test set holds all of a client's."""

    corpus: sources.Corpus
    read: Callable


def deal(config):
    """The Dealt of a run. A table that is dealt is read whole by every process; of clients' own folders each process reads
    those that it asks for."""
    source = source_of(config)
    need_test = config.execution.eval_every > 0 and not config.private_test.share
    if config.data.partition == partition.FOLDERS:
        folder_names = folders.names(source, config.schedule.clients)
        corpus = sources.load_public(source, need_test)
        return Dealt(
            corpus, lambda clients: _together({k: folders.read(source, corpus, folder_names[k]) for k in clients})
        )
    corpus = sources.load(source, need_test)
    train = corpus.train
    parties = config.data.parties or config.schedule.clients
    shares = partition.partition(
        config.data.partition, train.labels, train.groups, parties, config.schedule.split_seed, train.units
    )[config.data.party :]

    def read(clients):
        taken = {k: records.take(train, shares[k]) for k in clients}
        if corpus.test is not None:
            records.refuse_copy(list(taken.values()), records.columns_of(corpus.test))
        return _together(taken)

    return Dealt(corpus, read)


def source_of(config):
    """The Source that a configuration's fields name."""
    data = config.data
    return sources.Source(
        dataset=data.dataset, data_dir=data.data_dir, test_data=data.test_data, text_column=data.text_column,
        label_column=data.label_column, prompt_column=data.prompt_column, answer_column=data.answer_column,
        group_column=partition.group_column(data.partition), unit_column=config.privacy.unit_column,
        labels=data.labels or None, test_fraction=data.test_fraction, split_seed=config.schedule.split_seed,
        train_records=data.train_records, test_records=data.test_records, encoding=data.encoding, separator=data.separator,
    )  # fmt: skip


def by_client(table, shares):
    """What `Dealt.read` gave, as a list of Records: one a client."""
    return [records.take(table, share) for share in shares.values()]


def load(config):
    """The corpus, and each client's indices into its training records."""
    dealt = deal(config)
    train, shares = dealt.read(range(config.schedule.clients))
    return dealt.corpus._replace(train=train), [shares[k] for k in range(config.schedule.clients)]


def _together(by_client):
    """Several clients' records as one table, and where each one's are in it."""
    ends = np.cumsum([0, *(len(part.labels) for part in by_client.values())])
    places = {k: np.arange(start, end) for k, start, end in zip(by_client, ends[:-1], ends[1:], strict=True)}
    return records.together(by_client.values()), places
