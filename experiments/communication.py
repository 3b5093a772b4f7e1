"""What a client sends for each rank, exactly, from the shapes of published models: `python -m experiments.communication`.

Prints a Markdown table of bytes a round and for a whole run, and how many times less that is than full fine-tuning, for the
DP-LoRA paper's models (Liu et al., arXiv 2312.17493). No weights are needed.
"""

import functools
import sys

from absl import flags as absl_flags

from dplora_jax.config import Base
from dplora_jax.errors import InputError
from experiments import cli
from experiments.cli import exits
from experiments.text import formats
from experiments.text.tables import Table

MODELS = ("gpt2", "bert-base", "chatglm-6b", "llama2-7b")  # the paper's
RANKS = (1, 4, 8, 16, 64, 256, 512)
SHOWN = {4, 64, 512}  # in a report
TARGETS = ("q", "v")
BYTES = 4  # of a number that travels


@functools.cache
def parameters(model, targets=TARGETS):
    """(trained for each unit of rank, in the whole model) of a known model, as exact counts."""
    import jax

    from dplora_jax import lora
    from experiments.plan import models as plan_models

    built, shapes = plan_models.build(Base(model), None)
    config = lora.LoraConfig(1, 1.0, targets)
    adapter = jax.eval_shape(lambda key, params: lora.init(key, built, params, config), jax.random.key(0), shapes)
    return lora.count(adapter), lora.count(shapes)


def rows(rounds, targets=TARGETS, models=MODELS, ranks=RANKS):
    """A dict a model and rank: `bytes_round` and `bytes_run` that a client sends, the same of full fine-tuning, and the ratio."""
    for model in models:
        each, full = parameters(model, tuple(targets))
        for rank in ranks:
            sent = BYTES * rank * each
            yield {
                "model": model, "rank": rank, "bytes_round": sent, "bytes_run": rounds * sent, "full_round": BYTES * full,
                "full_run": rounds * BYTES * full, "ratio": full / (rank * each),
            }  # fmt: skip


def run_rows(config):
    """(targets, rows) of all models, for the rounds and targets of a RunConfig; for the usual targets where it names none, or a
    family's own."""
    targets = config.lora.targets or TARGETS
    try:
        return targets, list(rows(config.schedule.rounds, targets))
    except (ValueError, KeyError):
        return TARGETS, list(rows(config.schedule.rounds))


def by_rank(rows, config):
    """The Table of `rows` that a report of a RunConfig shows: the usual ranks, and its own."""
    body = [
        [f"{row['model']}, rank {row['rank']}", *_sizes(row), f"{row['ratio']:,.4g}×"]
        for row in rows
        if row["rank"] in SHOWN | {config.lora.rank}
    ]
    return Table(["model", "up a round", f"up in {config.schedule.rounds} rounds", "full fine-tuning", "less"], body)


def _sizes(row):
    return [formats.size(row[name]) for name in ("bytes_round", "bytes_run", "full_run")]


@exits.guarded
def main(argv=None):
    """Run the command line `argv` (default: this process's) -> exit code."""
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_integer("rounds", 50, "rounds of the run", lower_bound=1, flag_values=values)
    absl_flags.DEFINE_list("targets", list(TARGETS), "matrices that are adapted", flag_values=values)
    absl_flags.DEFINE_list("models", list(MODELS), "models by name", flag_values=values)
    try:
        cli.read_alone(sys.argv[1:] if argv is None else argv, values, "communication", __doc__)
        table = list(rows(values.rounds, values.targets, values.models))
    except (absl_flags.Error, ValueError) as error:
        raise error if isinstance(error, InputError) else InputError(" ".join(str(error).split())) from None
    head = ["model", "rank", "up a round", f"up in {values.rounds} rounds", f"full fine-tuning, {values.rounds} rounds"]
    body = [[row["model"], str(row["rank"]), *_sizes(row), f"{row['ratio']:,.4g}"] for row in table]
    print(Table([*head, "times less"], body).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
