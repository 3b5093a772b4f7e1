"""What a run will cost, and what a budget buys, before any run: no model is loaded, no JAX imported.

    python -m experiments.budget --flagfile=finance.flags
    python -m experiments.budget --records=775 --clients=5 --noise_multiplier=2 --rounds=50 --expected_batch_size=8
    python -m experiments.budget --records=400,3000 --epsilon=8 --noise_multiplier=1 --solve=rounds --plot=budget.svg

Every flag of a run is taken, with a run's defaults. One of epsilon, noise_multiplier, rounds and expected_batch_size follows
from the other three: the one that --solve names, else the one not given. Exit codes are 0 done, 2 bad input,
74 a file cannot be written.
"""

import dataclasses
import math
import pathlib
import sys
from typing import NamedTuple

from absl import flags as absl_flags

from dplora_jax import guard
from dplora_jax.config import RunConfig, field_value, replace
from dplora_jax.errors import InputError
from dplora_jax.federation import held_out, participation, trust
from dplora_jax.files import to_json
from dplora_jax.privacy import accounting, clippers, noises, paper_bound
from experiments import cli
from experiments.cli import exits

UNKNOWNS = ("noise_multiplier", "epsilon", "rounds", "expected_batch_size")
MOST_ROUNDS = 1 << 17  # where the search for rounds ends
POINTS = 24  # of a curve over the rounds
# What to ask for in place of other trust modes.
ASK_LOCAL = {
    "distributed": "at the same --noise_multiplier it costs a client what --trust=local does. Ask for that.",
    "client": "its records are clients. Ask for --trust=local with --clients=1, --records=the clients and "
    "--expected_batch_size=client_rate times the clients, which is true to a thousandth.",
}
CURVES = 5  # from the fewest records to the most, where there are more distinct sizes


class Question(NamedTuple):
    """The unknown's name, a checked RunConfig of the rest, how many records of each client train, and how many it keeps back.
    Where epsilon or noise_multiplier is not the unknown, `config` has it; rounds and expected_batch_size, where unknown, hold
    values of no meaning."""

    solve: str
    config: RunConfig
    sizes: tuple
    kept: list = ()


class Answer(NamedTuple):
    """A config with the unknown filled in, and for each distinct size (ascending) its Mechanism and what its rounds cost."""

    config: RunConfig
    sizes: list
    mechanisms: list
    epsilons: list
    bounded: bool  # the unknown stopped at the end of its range, not at the budget


@exits.guarded
def main(argv=None):
    """Answer the command line `argv` (default: this process's) -> exit code."""
    from experiments.budget import text as budget_text

    guard.begin(
        phrase=cli.as_flags
    )  # the sizes may be those of a table; nor are Renyi orders that do not converge worth a word: others do
    question, options = parse(sys.argv[1:] if argv is None else argv)
    answer = solve(question)
    result = tell(question, answer)
    if options["plot"]:
        budget_text.plot(result, options["plot"])
    if options["json"]:
        print(to_json(result, indent=2))
    else:
        budget_text.show(result)
    return 0


def parse(argv):
    """The command line (without the program's name) -> (Question, {"plot", "json"}); InputError with one sentence."""
    values = absl_flags.FlagValues()
    text = {
        "records": "records of each client, comma-separated, or of every one of --clients; default: as the run's data has them",
        "solve": f"what to compute: {', '.join(UNKNOWNS)}; default: the one not given",
        "plot": "file for a figure of epsilon over the rounds, .png, .svg or .pdf",
    }
    for name, help_text in text.items():
        absl_flags.DEFINE_string(name, None, help_text, flag_values=values)
    absl_flags.DEFINE_boolean("json", False, "print everything as one JSON object", flag_values=values)
    usage = "python -m experiments.budget --records=775 --clients=5 --epsilon=8 [flags, those of a run included]"
    cli.read(argv, values, usage)
    plot = values.plot and pathlib.Path(values.plot)
    if plot and (plot.suffix not in (".png", ".svg", ".pdf") or not plot.parent.is_dir()):
        raise InputError(f"--plot={plot} must name a .png, .svg or .pdf file in a directory that exists.")
    given = {name for name in (*UNKNOWNS, "clients") if values[name].present}
    config = cli.without_auto(cli.raw(values))
    numbers = {name: field_value(config, name) for name in ("epsilon", "noise_multiplier")}
    given -= {name for name, value in numbers.items() if value is None}
    unknown = _unknown(values.solve, given)
    config = _checked(config, unknown, numbers)
    sizes = _sizes(values.records, config, "clients" in given)
    kept = held_out.kept_back(config, sizes) if config.private_test.share else []
    return Question(unknown, config, tuple(held_out.training(config, sizes)), kept), {
        "plot": plot,
        "json": values.json,
    }


def _unknown(name, given):
    """The unknown to solve for: the one named, else the one not given."""
    if name is not None and name not in UNKNOWNS:
        raise InputError(f"--solve={name} is not known: {', '.join(UNKNOWNS)}.")
    if name is None:
        if not given & {"epsilon", "noise_multiplier"}:
            raise InputError(
                "give --epsilon to compute the noise that it needs, or --noise_multiplier to compute its cost."
            )
        name = next((unknown for unknown in UNKNOWNS if unknown not in given), None)
        if name is None:
            raise InputError(f"{', '.join(UNKNOWNS)} are all given: say with --solve which of them to compute.")
    missing = {"epsilon", "noise_multiplier"} - {name} - given
    if missing:
        raise InputError(f"--solve={name} needs --{' and --'.join(sorted(missing))}.")
    return name


def _checked(config, unknown, numbers):
    """The config as a run checks it, with the unknown unset; rounds and batch, where unknown, at 1."""
    if config.privacy.trust in ASK_LOCAL:
        raise InputError(
            f"this command does not answer for --trust={config.privacy.trust}: {ASK_LOCAL[config.privacy.trust]}"
        )
    if not trust.mode(config).private or math.inf in numbers.values():
        raise InputError("this command needs a private --trust, with a finite --epsilon and --noise_multiplier.")
    if clippers.kind(config).moves or noises.KINDS[config.privacy.noise].correlated:
        raise InputError(
            f"this command accounts plain steps: only a run calibrates --clipping={config.privacy.clipping} with "
            f"--noise={config.privacy.noise}. Use --clipping=flat and --noise=independent."
        )
    if participation.scheduled(config):
        raise InputError(
            f"this command accounts one client's own rounds: leave out --participation={config.schedule.participation}, and give "
            "--rounds=the rounds that the client is in."
        )
    if unknown in ("rounds", "expected_batch_size"):
        config = replace(config, **{unknown: 1})
    known = {name: value for name, value in numbers.items() if name != unknown}
    for name, value in known.items():  # a run takes one of the two: check them one at a time
        resolved = cli.settle(replace(config, **(dict.fromkeys(numbers) | {name: value})))
    return replace(resolved, **(dict.fromkeys(numbers) | known))


def _sizes(text, config, clients_given):
    """Each client's number of records: as --records says, else as the run's data and partition have them."""
    if text is None:
        from dplora_jax.finetuning import dealing

        return tuple(len(share) for share in dealing.load(config)[1])
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise InputError(f"--records={text} must be one or more whole numbers above 0, separated by commas.")
    if len(sizes) == 1:
        return sizes * config.schedule.clients
    if clients_given and config.schedule.clients != len(sizes):
        raise InputError(
            f"--records names {len(sizes)} clients and --clients={config.schedule.clients}: give one of the two."
        )
    return sizes


def solve(question):
    """The unknown of a Question -> Answer. Raises InputError where the budget is out of reach."""
    unknown, config = question.solve, question.config
    sizes, bounded = sorted(set(question.sizes)), False
    if unknown in ("rounds", "expected_batch_size"):
        value, bounded = _largest(unknown, config, sizes)
        config = replace(config, **{unknown: value})
    mechanisms = _mechanisms(config, sizes)
    epsilons = [accounting.epsilon(m, _steps(config), config.privacy.delta) for m in mechanisms]
    if unknown == "epsilon":
        config = replace(config, epsilon=max(epsilons))
    if unknown == "noise_multiplier":
        config = replace(config, noise_multiplier=max(m.noise_multiplier for m in mechanisms))
    return Answer(config, sizes, mechanisms, epsilons, bounded)


def _mechanisms(config, sizes):
    """As a run with these flags would have them."""
    size, steps = config.schedule.expected_batch_size, _steps(config)
    if config.privacy.noise_multiplier is None:
        return accounting.calibrate(sizes, size, steps, config.privacy.epsilon, config.privacy.delta)
    return accounting.with_noise(sizes, size, steps, config.privacy.noise_multiplier, config.privacy.delta)


def _steps(config):
    return config.schedule.rounds * config.schedule.local_steps


def _largest(unknown, config, sizes):
    """The largest whole value of `unknown` that keeps every client within epsilon -> (value, whether its range ended there).

    Without a capacity the client with the fewest records pays most (its q is the largest), and its cost rises with the unknown: a
    bisection. What a run's capacities add, under a thousandth, is then stepped back from.
    """

    def cost(value):
        tried = replace(config, **{unknown: value})
        rate = accounting.sampling_rate(sizes[0], tried.schedule.expected_batch_size)
        plain = accounting.Mechanism(sizes[0], rate, sizes[0], config.privacy.noise_multiplier)
        return accounting.epsilon(plain, _steps(tried), config.privacy.delta)

    def fits(value):
        tried = replace(config, **{unknown: value})
        return all(
            accounting.epsilon(m, _steps(tried), config.privacy.delta) <= config.privacy.epsilon
            for m in _mechanisms(tried, sizes)
        )

    end = MOST_ROUNDS if unknown == "rounds" else sizes[-1]
    low, high = 0, 1
    while high <= end and cost(high) <= config.privacy.epsilon:
        low, high = high, 2 * high
    high = min(high, end + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= config.privacy.epsilon else (low, middle)
    while low and not fits(low):
        low -= max(1, low // 1000)
    if not low:
        what = "a single round" if unknown == "rounds" else "an expected batch of 1"
        raise InputError(
            f"epsilon {config.privacy.epsilon:g} is out of reach: {what} costs {cost(1):.4g}; raise --noise_multiplier or "
            "--epsilon."
        )
    return low, low == end


def tell(question, answer):
    """Everything that the table, the figure and --json say, as plain values: floats, whole numbers, text."""
    config, steps = answer.config, _steps(answer.config)
    rounds = sorted({max(1, round(config.schedule.rounds * i / POINTS)) for i in range(POINTS + 1)})
    counts = tuple(count * config.schedule.local_steps for count in rounds)
    few = min(CURVES, len(answer.mechanisms))
    curves = [round(i * (len(answer.sizes) - 1) / max(1, few - 1)) for i in range(few)]
    clients = []
    for n, m, spent in zip(answer.sizes, answer.mechanisms, answer.epsilons, strict=True):
        sigma, paper = m.noise_multiplier, paper_bound.epsilon
        clients.append(
            {
                **dataclasses.asdict(m),
                "records": n,
                "sampled_from": m.records,
                "clients": question.sizes.count(n),
                "epsilon": spent,
                "mean_gradient_noise": sigma * config.privacy.clip_norm / (m.sampling_rate * n),
                "renyi_epsilon": accounting.renyi_epsilon(m, steps, config.privacy.delta),
                "paper_epsilon": paper(m.sampling_rate, sigma, steps, config.privacy.delta),
                "paper_reach": paper_bound.reach(m.sampling_rate, steps),
            }
        )
    test = held_out.cost(config, question.kept)._asdict() if question.kept else None
    names = ("rounds", "local_steps", "expected_batch_size", "epsilon", "noise_multiplier", "delta", "clip_norm")
    return {
        "solved": question.solve,
        "at_end_of_range": answer.bounded,
        **{name: field_value(config, name) for name in names},
        "clients": clients,
        "private_test": test,
        "curve_rounds": rounds,
        "curves": [
            {
                "records": answer.sizes[i],
                "epsilon": list(accounting.epsilon_curve(answer.mechanisms[i], counts, config.privacy.delta)),
            }
            for i in curves
        ],
    }
