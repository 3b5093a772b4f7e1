"""Secrets in one client's text: does the released adapter give them away? `python -m experiments.memorisation --flagfile=...`

Canary sentences, each with a random number as its secret, are added to client 0's records; the federation is trained without
privacy and as the flags say. Exposure is log2(candidates) - log2(the secret's rank among them by likelihood) (Carlini et al.
2019, arXiv 1802.08232, section 4): its mean is about 1.4 bits for secrets that were never seen. Extraction writes on from the
canary's beginning, greedily. Nothing of a run is saved but `memorisation.json` in a directory of its own. Exit codes: 0 done,
2 bad input, 74 a file cannot be written.

Every copy of a canary is a record: a guarantee is for one of them, and c copies are protected by the rules of groups alone. With
--privacy_unit=column:NAME the copies of a canary are one person's rows, a unit more at client 0.
"""

import functools
import sys
from typing import NamedTuple

import numpy as np
from absl import flags as absl_flags

from dplora_jax.config import field_value, replace
from dplora_jax.data import partition
from dplora_jax.errors import InputError
from dplora_jax.federation import trust
from experiments import cli
from experiments.cli import exits

THINGS = ("access code", "account number", "patient number", "door code", "badge number", "file number")
NAMES = (
    "Ada Quist",
    "Bram Oduya",
    "Cleo Varga",
    "Dario Lind",
    "Esme Tarrant",
    "Felix Okafor",
    "Greta Moss",
    "Hugo Brandt",
)
DIGITS = 6


class Options(NamedTuple):
    """The command's own flags."""

    canaries: int
    copies: int
    candidates: int
    seed: int
    folder: str


class Canary(NamedTuple):
    """A sentence up to its secret, and the secret."""

    beginning: str
    secret: str


@exits.guarded
def main(argv=None):
    """Run the command line `argv` (default: this process's) -> exit code."""
    from dplora_jax import guard, private_files
    from dplora_jax.federation import storage

    guard.begin(phrase=cli.as_flags)
    config, options = parse(sys.argv[1:] if argv is None else argv)
    with storage.locked(options.folder) as folder, private_files.reasons_in(folder):
        if (folder / "config.json").exists():
            raise InputError(f"--workdir={folder} holds a run: canaries need a directory of their own.")
        lines = []
        print(private_files.NOTE)
        print(
            f"{options.canaries} canaries, {options.copies} copies each; "
            f"exposure at most {np.log2(options.candidates + 1):.1f} bits"
        )
        print(f"{'run':>14}{'exposure, mean':>16}{'largest':>9}{'extracted':>11}{'epsilon':>9}")
        for name, line in results(config, options):
            mean, most = np.mean(line["exposure"]), max(line["exposure"])
            extracted = f"{sum(line['extracted'])} of {options.canaries}"
            print(f"{name:>14}{mean:16.2f}{most:9.2f}{extracted:>11}{line['epsilon']:>9}", flush=True)
            lines.append({"run": name, **line})
        document = {
            "release": "NOT FOR RELEASE: seeded, and one of the runs has no privacy",
            "canaries": options.canaries,
            "copies": options.copies,
            "candidates": options.candidates,
            "runs": lines,
        }
        private_files.write(folder / "memorisation.json", document)
    return 0


def parse(argv):
    """The command line (without the program's name) -> (RunConfig, Options). Raises InputError."""
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_integer(
        "canaries", 8, "secrets in client 0's records", 1, len(NAMES) * len(THINGS), flag_values=values
    )
    absl_flags.DEFINE_integer("copies", 1, "records with each", lower_bound=1, flag_values=values)
    absl_flags.DEFINE_integer(
        "candidates", 999, "other secrets that each is ranked among", lower_bound=1, flag_values=values
    )
    absl_flags.DEFINE_integer(
        "canary_seed", 1, "seed of the secrets and of the noise", lower_bound=0, flag_values=values
    )
    values, name = cli.read(argv, values, "python -m experiments.memorisation --flagfile=general.flags [flags]")
    given = cli.chosen(values)
    config = cli.settle(replace(given, workdir=given.output.workdir or f"runs/{name or given.data.dataset}-canaries"))
    if not trust.mode(config).private:
        raise InputError(
            "this command compares a private run with one without privacy: give --epsilon or --noise_multiplier."
        )
    if config.data.partition == partition.FOLDERS:
        raise InputError(
            "--partition=folders cannot be used here, since canaries are added to one table before it is dealt: give "
            "another --partition."
        )
    return config, Options(values.canaries, values.copies, values.candidates, values.canary_seed, config.output.workdir)


def canaries(options):
    """`own.canaries` canaries, their secrets drawn by `own.seed`."""
    rng = np.random.default_rng(options.seed)
    subjects = [(thing, name) for thing in THINGS for name in NAMES]
    chosen = rng.permutation(len(subjects))[: options.canaries]
    return [Canary("The {} of {} is".format(*subjects[index]), _secret(rng)) for index in chosen]


def _secret(rng):
    return " " + "".join(map(str, rng.integers(0, 10, DIGITS)))


def as_records(inserted, task):
    """Each canary as a record of `task`: its beginning is the prompt where there are prompts."""
    from dplora_jax.data import tasks
    from dplora_jax.data.records import Records

    answers = task.kind == tasks.ANSWERS
    texts = tuple(c.beginning if answers else c.beginning + c.secret for c in inserted)
    return Records(
        texts, np.zeros(len(texts), np.int32), None, tuple(c.secret.strip() for c in inserted) if answers else None
    )


def with_canaries(dealt, inserted, copies):
    """The Dealt in which client 0 has `copies` more records for each of `inserted`."""
    from dplora_jax.data import records

    extra = records.together([as_records(inserted, dealt.corpus.task)] * copies)
    owners = tuple(f"canary {number}" for number in range(len(inserted))) * copies

    def read(clients):
        table, places = dealt.read(clients)
        if 0 in places:
            places = places | {0: np.concatenate([places[0], len(table.texts) + np.arange(len(extra.texts))])}
            table = records.together([table, extra._replace(units=table.units and owners)])
        return table, places

    return dealt._replace(read=read)


def results(config, options):
    """(name, what was found) of the base model, of training without privacy, and of training as configured."""
    from dplora_jax import models
    from dplora_jax.data import tasks
    from dplora_jax.federation import storage
    from dplora_jax.finetuning import dealing, objectives, setup
    from experiments.attacks import canaries as canary_program

    bare = replace(
        config, trust="none", epsilon=None, noise_multiplier=None, clip_norm=float("inf"), noise="independent"
    )
    for name, known in canary_program.PLAIN:
        if (field_value(config, name) or None) != (known or None):
            raise InputError(f"--{name}={field_value(config, name)} cannot be measured yet, only {known}.")
    inserted, tokenizer = canaries(options), models.load_tokenizer(config.base.name)
    task = dealing.deal(config).corpus.task
    if task.kind == tasks.LABELS or objectives.kind(config, task) != objectives.LANGUAGE_MODEL:
        raise InputError(
            f"--dataset={config.data.dataset} trains no language model on text or answers: there is nothing to memorise."
        )
    dealt = with_canaries(dealing.deal(config), inserted, options.copies)
    for name, one in (("no privacy", bare), ("as configured", config)):
        job = setup.prepare(replace(one, eval_every=0, seed=options.seed), dealt=dealt)
        measure = functools.partial(_measure, config, options, task, tokenizer, inserted)
        if name == "no privacy":
            job.federation.prepare(job.shards)
            yield "base model", job.federation.evaluate(measure) | {"epsilon": "-"}
        *_, last = job.federation.fit(job.shards, storage.InMemory(), start=job.start)
        spent = f"{max(last.epsilon):.3f}" if trust.mode(one).private else "inf"
        yield name, job.federation.evaluate(measure) | {"epsilon": spent}


def _measure(config, options, task, tokenizer, inserted, prepared):
    """A function (adapter, residual, ends) -> {"exposure": [C] bits, "extracted": [C] bool}; canaries are asked as they were
    trained on."""
    from dplora_jax import evaluation, generation
    from dplora_jax.data import encoding, tasks

    whole = prepared.whole_model
    rng = np.random.default_rng((options.seed, 1))
    asked, begun = [], []
    for canary in inserted:
        all_of_it = [canary, *(canary._replace(secret=_secret(rng)) for _ in range(options.candidates))]
        one = tasks.asked(task, as_records(all_of_it, task), config.data.chat)
        asked.append(tasks.Asked(tuple(a.prompts[0] for a in one), tuple(a.answers[0] for a in one)))
        alone = tasks.asked(task, as_records([canary._replace(secret="")], task), config.data.chat)[0]
        begun.append(alone)
    longest = encoding.most_tokens(tokenizer, asked, config.data.chat)[1]
    if longest > config.data.max_length:
        raise InputError(
            f"a canary has {longest} tokens, and --max_length={config.data.max_length} would cut off its secret; raise it."
        )
    most = whole.config.max_positions
    if longest + 2 * DIGITS > most:
        raise InputError(
            f"a canary and what is written behind it have {longest + 2 * DIGITS} tokens, and the model {most} positions."
        )
    table = encoding.all_answers(tokenizer, asked, longest, config.data.chat)
    likelihoods = evaluation.likelihoods(whole, prepared.mesh, prepared.params, table)
    prompts = encoding.prompts(tokenizer, begun, longest, config.data.chat)

    def measure(adapter, residual, ends):
        nats = likelihoods(adapter).reshape(len(inserted), -1)
        ranks = 1 + (nats[:, 1:] >= nats[:, :1]).sum(1)
        written = generation.generate(
            whole,
            prepared.params,
            prompts,
            max_new_tokens=2 * DIGITS,
            adapter=adapter,
            pad_token=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(np.asarray(written), skip_special_tokens=True)
        hits = [text.strip().startswith(c.secret.strip()) for text, c in zip(texts, inserted, strict=True)]
        return {"exposure": (np.log2(options.candidates + 1) - np.log2(ranks)).tolist(), "extracted": hits}

    return measure
