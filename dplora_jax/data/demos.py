"""The embedded corpora by name: all synthetic, and labelled so wherever a figure of theirs is shown."""

import numpy as np

from dplora_jax.data import finance_demo, general_demo, medical_demo, tasks
from dplora_jax.data.records import Corpus, Records

FINANCE = tasks.Task(
    tasks.LABELS, tasks.label_words(finance_demo.LABEL_NAMES, tasks.SENTIMENT), label_names=finance_demo.LABEL_NAMES
)
DEMOS = {
    "finance_demo": (finance_demo, FINANCE),
    "medical_demo": (medical_demo, tasks.own_table(tasks.ANSWERS)),
    "general_demo": (general_demo, tasks.own_table(tasks.TEXT)),
}


def load(name, seed):
    """The Corpus of the demo `name`."""
    demo, task = DEMOS[name]
    parts = demo.generate(seed)
    train, test = (_records(parts[split], task) for split in ("train", "test"))
    return Corpus(train, test, task, f"{name}: {demo.DESCRIPTION}", synthetic=True)


def _records(part, task):
    if task.kind == tasks.LABELS:
        return Records(tuple(part[0]), np.array(part[1], np.int32))
    texts, answers = part if task.kind == tasks.ANSWERS else (part, None)
    return Records(tuple(texts), np.zeros(len(texts), np.int32), None, answers and tuple(answers))
