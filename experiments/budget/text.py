"""How `experiments.budget` shows its answer: a table and bars in the terminal, and a figure of epsilon over the rounds."""

import itertools

from dplora_jax import errors
from dplora_jax.errors import InputError
from dplora_jax.privacy import accounting
from experiments.text import formats
from experiments.text.tables import Table

BARS, WIDTH = 8, 40


def show(result):
    """Print the answer in a sentence, a table with a row for each distinct size, bars over the rounds, and the notes."""
    print(_sentence(result))
    print(_table(result).text())
    worst = max(result["curves"], key=lambda row: row["epsilon"][-1])
    print(f"\nepsilon by round, for clients of {worst['records']:,} records")
    counts = result["curve_rounds"]
    for index in sorted({round((len(counts) - 1) * i / (BARS - 1)) for i in range(BARS)}):
        spent = worst["epsilon"][index]
        bar = "█" * round(WIDTH * spent / worst["epsilon"][-1])
        print(f"{counts[index]:>8,} {bar} {formats.epsilon(spent)}")
    print()
    for note in notes(result):
        print(note)


def _table(result):
    """A row for each distinct size, or for those of one mechanism."""
    body = []
    for rows in _alike(result["clients"]):
        row, last = rows[0], rows[-1]
        cells = [row["sampling_rate"], row["capacity"], row["noise_multiplier"], result["rounds"]]
        body.append(
            [
                formats.span([row["records"], last["records"]]),
                str(sum(each["clients"] for each in rows)),
                *map(formats.number, cells),
                formats.epsilon(row["epsilon"]),
                formats.epsilon(row["renyi_epsilon"]),
                formats.number(row["paper_epsilon"]),
                formats.number(row["mean_gradient_noise"]),
            ]
        )
    head = ["records", "clients", "q", "capacity", "sigma", "rounds", "epsilon", "RDP", "paper", "noise"]
    return Table(head, body)


def _alike(clients):
    """Rows in groups of one mechanism (`size_classes`); of each, the first has the fewest records and so the most noise."""
    mechanism = lambda row: tuple(row[name] for name in ("sampled_from", "sampling_rate", "noise_multiplier"))  # noqa: E731
    return [list(rows) for _, rows in itertools.groupby(clients, mechanism)]


def _sentence(result):
    """The answer in words."""
    rounds, batch = f"{result['rounds']:,} rounds", f"expected batch {result['expected_batch_size']:g}"
    steps = f" of {result['local_steps']} local steps" if result["local_steps"] > 1 else ""
    spent = max(row["epsilon"] for row in result["clients"])
    sigma = "noise multiplier " + formats.span([row["noise_multiplier"] for row in result["clients"]])
    at = f"at delta {result['delta']:g}"
    budget = f"epsilon {result['epsilon']:.4g} {at}"
    least = "at least " if result["at_end_of_range"] else "at most "
    largest = (
        f"Every batch stays within {budget}, all records at once ({batch}) too"
        if result["at_end_of_range"]
        else f"{batch.capitalize()} is the largest that stays within {budget}"
    )
    return {
        "epsilon": f"epsilon {formats.epsilon(spent)} {at} is what {rounds}{steps} cost, with {sigma} and {batch}.",
        "noise_multiplier": f"{sigma[0].upper()}{sigma[1:]} keeps {rounds}{steps} within {budget}, with {batch}.",
        "rounds": f"{least.capitalize()}{rounds}{steps} stay within {budget}, with {sigma} and {batch}.",
        "expected_batch_size": f"{largest}, with {sigma} and {rounds}{steps}.",
    }[result["solved"]]


def notes(result):
    """What the columns mean, and what they do not promise."""
    reach = max(row["paper_reach"] for row in result["clients"])
    yield "epsilon  by privacy loss distributions, the capacity's truncation included: an upper bound, what a run reports"
    yield "RDP      by Renyi accounting, without a capacity: a looser upper bound, as a cross-check"
    yield "paper    q sqrt(T log(1/delta)) / sigma: the asymptotic form of arXiv 2312.17493, its unspecified constant"
    yield f"         set to 1. NO GUARANTEE; claimed only below an unspecified multiple of q^2 T = {reach:.3g}"
    if any(row["renyi_epsilon"] < row["epsilon"] for row in result["clients"]):
        yield f"         RDP below epsilon: a step's loss is so small that its rounding up to a grid of {accounting.GRID:g} tells"
    if test := result["private_test"]:
        yield f"kept     {sum(test['units']):,} more records never train: {test['evaluations']} evaluations with"
        yield f"         sigma {test['noise_multiplier']:.4g} cost each of them epsilon {formats.epsilon(test['epsilon'])} in all"
    yield "noise    standard deviation on each coordinate of a step's mean gradient: sigma clip_norm / (q n)"


def plot(result, path):
    """Write the figure of epsilon over the rounds to `path`: a curve for each size in "curves", and the paper's form for
    the fewest records. Raises InputError where the file cannot be written."""
    from matplotlib.figure import Figure

    by_size, rounds = {row["records"]: row for row in result["clients"]}, result["curve_rounds"]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for curve in result["curves"]:
        sigma = by_size[curve["records"]]["noise_multiplier"]
        label = f"{curve['records']:,} records, sigma {sigma:.3g}"
        axes.plot([0, *rounds], [0, *curve["epsilon"]], label=label)
    first = result["clients"][0]
    paper = [first["paper_epsilon"] * (done / rounds[-1]) ** 0.5 for done in (0, *rounds)]
    axes.plot([0, *rounds], paper, "--", color="grey", label=f"the paper's form for {first['records']:,}, no guarantee")
    if result["solved"] != "epsilon":
        axes.axhline(result["epsilon"], color="grey", linewidth=0.8)
    axes.set(xlabel="round", ylabel=f"epsilon at delta {result['delta']:g}", xlim=(0, None), ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    try:
        figure.savefig(path)
    except OSError as error:
        raise errors.storage(error) or InputError(f"--plot={path} cannot be written ({error.strerror}).") from None
