"""How the records that clients keep back are scored, where their rows as they train are not what is asked of them."""

import numpy as np

from dplora_jax import evaluation
from dplora_jax.data import records, tasks
from dplora_jax.federation import own_rows, private_scores
from dplora_jax.finetuning import objectives
from dplora_jax.privacy import unit_scores


def scorer(objective, corpus, private, prepared, held):
    """The `private_scores.Measure` of a run's task on what is `held` back (a `held_out.HeldOut`) of `private` {client: Records}.

    Labels' words are compared by their likelihood, as on a public test set; a classifier's labels, answers and texts are measured
    on the rows as they train. Prepared and held are as `Federation.fit` gives them.
    """
    if objective.kind == objectives.CLASSIFIER or corpus.task.kind != tasks.LABELS:
        return private_scores.of_rows(objective.loss, prepared, held)
    classes, loss = len(corpus.label_names), objective.loss
    kept = {k: records.take(private[k], part.places) for k, part in held.parts.items()}
    tables = {k: objective.test(part) for k, part in kept.items()}  # a row for each word of each record
    counted = {k: table["loss_mask"][:, 1:].sum(1) for k, table in tables.items()}
    through = {k: prepared.through_frozen_layers(table) for k, table in tables.items()}
    room = [classes * rows for rows in held.rows]
    means = own_rows.by_client(
        prepared, through, lambda based, adapter, batch: loss(prepared.model, based)(adapter, batch), room
    )

    def run(adapter, residual=()):
        said = {
            k: evaluation.likeliest(-mean.astype(np.float64) * counted[k], classes)
            for k, mean in means(adapter, residual).items()
        }
        return {k: private_scores.pairs(kept[k].labels, labels, classes) for k, labels in said.items()}

    units = {k: part.units for k, part in held.parts.items()}
    return private_scores.Measure(unit_scores.Labels(classes), units, run)
