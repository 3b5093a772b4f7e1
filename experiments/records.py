"""The records that a run's flags name, dealt to its clients; no model and no JAX."""

from dplora_jax.data import partition, sources


def load(config):
    """The corpus, and each client's indices into its training records."""
    names = tuple(name.strip() for name in config.labels.split(",")) if config.labels else None
    corpus = sources.load(
        sources.Source(
            dataset=config.dataset, data_dir=config.data_dir, test_data=config.test_data, text_column=config.text_column,
            label_column=config.label_column, group_column=partition.group_column(config.partition), labels=names,
            test_fraction=config.test_fraction, split_seed=config.split_seed,
        ),
        need_test=config.eval_every > 0,
    )  # fmt: skip
    return corpus, partition.partition(
        config.partition, corpus.train.labels, corpus.train.groups, config.clients, config.split_seed
    )
