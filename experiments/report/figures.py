"""The figures of the report, as inline SVG in the page's own colours and fonts."""

import math
from typing import NamedTuple

from markupsafe import Markup, escape

from dplora_jax.files import number
from experiments.text import formats

# Figures are drawn in these colours, then each is replaced by a CSS variable, so that one SVG serves light and dark.
INK, GRID, SERIES = "#010101", "#020202", tuple(f"#{i:02x}{i:02x}{i:02x}" for i in range(3, 11))
VARIABLES = {INK: "--soft", GRID: "--line"} | {colour: f"--series-{i}" for i, colour in enumerate(SERIES)}
BOOKKEEPING = {"round", "epsilon", "epsilon_max", "bytes_up_per_client", "bytes_down_per_client", "seconds"}
BOOKKEEPING |= {"examples_per_second", "finished", "survivors", "private_test_epsilon"}
ENDS = ("_low", "_high")  # of a metric's interval


class Figure(NamedTuple):
    """A drawing with its title, its key (name, colour's number, whether the line is drawn in pieces), and its caption."""

    title: str
    keys: list
    svg: Markup
    caption: str


def by_metric(rows):
    """Each metric of the metrics lines (dicts) by name, as its rounds, its values and the epsilon_max that each had cost."""
    series = {}
    for row in rows:
        for name, value in row.items():
            if name not in BOOKKEEPING and not name.endswith(ENDS) and (value := number(value)) is not None:
                columns = series.setdefault(name, ([], [], []))
                for column, entry in zip(columns, (row["round"], value, row["epsilon_max"]), strict=True):
                    column.append(entry)
    return series


def spans(rows, name):
    """(the least, the most) that the metric `name` may be in each of the metrics lines that have it; None where it has no
    interval."""
    having = [row for row in rows if number(row.get(name)) is not None]
    if not having or any(number(row.get(f"{name}{end}")) is None for row in having for end in ENDS):
        return None
    return tuple([number(row[f"{name}{end}"]) for row in having] for end in ENDS)


def figure(identity, title, series, caption, draw, xlabel="round", broken=None):
    """The Figure of what `draw(axes)` draws: `identity` makes its ids the page's, `series` are the lines' names, of which those
    from number `broken` on, if any, are drawn in pieces."""
    first = len(series) if broken is None else broken
    keys = [(formats.metric_name(name), i % len(SERIES), i >= first) for i, name in enumerate(series)]
    return Figure(title, keys, _svg(identity, title, draw, xlabel), caption)


def _svg(identity, label, draw, xlabel):
    """What `draw(axes)` draws, the same bytes each time."""
    import io

    import matplotlib
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import FixedLocator, MaxNLocator

    settings = {"svg.hashsalt": identity, "svg.fonttype": "none", "font.size": 11, "axes.labelcolor": INK}
    with matplotlib.rc_context(settings):
        canvas = Canvas(figsize=(4.0, 2.65), layout="constrained")
        axes = canvas.add_subplot()
        draw(axes)
        axes.set_xlabel(xlabel)
        if axes.get_xscale() == "linear" and not isinstance(axes.xaxis.get_major_locator(), FixedLocator):
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=xlabel == "round"))
        if axes.get_yscale() == "linear":
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.tick_params(colors=INK, length=0)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(INK)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    body = text[text.index(">") + 1 :].replace("xlink:href", "href")
    # Ids are the page's, not the figure's: two figures must not share one.
    for mark in ('id="', 'href="#', "url(#"):
        body = body.replace(mark, f"{mark}{escape(identity)}-")
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    width, height = canvas.get_size_inches() * 72
    return Markup('<svg role="img" aria-label="{}" viewBox="0 0 {:g} {:g}">{}').format(
        label, width, height, Markup(body)
    )


def _plot_metrics(series, rows, against_epsilon):
    """A drawing of every metric in `series`, per round or against epsilon_max, with its interval in `rows` where it has one."""

    def draw(axes):
        for i, (name, (rounds, values, epsilons)) in enumerate(series.items()):
            x = epsilons if against_epsilon else rounds
            style = "o-" if i == 0 else "s--"
            if (ends := spans(rows, name)) is not None:
                axes.fill_between(x, *ends, color=SERIES[i % len(SERIES)], alpha=0.2, linewidth=0)
            axes.plot(x, values, style, color=SERIES[i % len(SERIES)], linewidth=2, markersize=4.2)

    return draw


def _plot_epsilon(rows, budget):
    """A drawing of epsilon per round: the largest client's line, the band of all clients, the budget."""

    def draw(axes):
        rounds = [row["round"] for row in rows]
        largest = [row["epsilon_max"] for row in rows]
        smallest = [min(row["epsilon"]) for row in rows]
        axes.fill_between(rounds, smallest, largest, color=SERIES[0], alpha=0.2, linewidth=0)
        axes.plot(rounds, largest, color=SERIES[0], linewidth=2)
        if math.isfinite(budget):
            axes.axhline(budget, color=SERIES[1], linewidth=1.5, linestyle=(0, (4, 3)))
        axes.set_ylim(bottom=0)

    return draw


def for_run(flags, rows, private):
    """Utility per round, epsilon per round, and each against the other, as far as the run has them -> Figures."""
    metrics = by_metric(rows)
    # A perplexity and an accuracy share no axis.
    groups = [{k: v for k, v in metrics.items() if ("perplexity" in k) == low} for low in (False, True)]
    groups = list(filter(None, groups))
    average = (
        f" The metrics are the averaged adapter’s (ema {formats.number(flags.aggregation.ema)})."
        if flags.aggregation.ema
        else ""
    )
    begins = "the base model" + (", trained on public records" if flags.public.trains else "")
    bands = " Bands are 95 % intervals." if any(spans(rows, name) for name in metrics) else ""
    charts = [
        figure(f"utility{i}", "Utility per round", series, f"Round 0 is {begins}.{average}{bands}",
               _plot_metrics(series, rows, against_epsilon=False), broken=1)
        for i, series in enumerate(groups)
    ]  # fmt: skip
    if rows and private and all(math.isfinite(row["epsilon_max"]) for row in rows):
        budget = math.inf if flags.privacy.epsilon is None else flags.privacy.epsilon
        keys = ["epsilon_max"] + ["budget (epsilon)"] * math.isfinite(budget)
        caption = f"What the uploads so far have cost, at delta {flags.privacy.delta:g}; the band spans all clients."
        charts.append(figure("epsilon", "Epsilon per round", keys, caption, _plot_epsilon(rows, budget), broken=1))
        caption = (
            "One point per evaluated round of this run; a run calibrated for a smaller epsilon draws another curve."
        )
        charts += [
            figure(f"trade{i}", "Utility against epsilon", series, caption,
                   _plot_metrics(series, rows, against_epsilon=True), "epsilon_max", broken=1)
            for i, series in enumerate(groups)
        ]  # fmt: skip
    return charts


def against_rank(rows, models, ranks, targets):
    """How many times less a client sends than in full fine-tuning, by rank, of `communication.rows` -> Figure."""
    series = {model: [row for row in rows if row["model"] == model] for model in models}

    def draw(axes):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for index, model_rows in enumerate(series.values()):
            x, y = [row["rank"] for row in model_rows], [row["ratio"] for row in model_rows]
            axes.plot(x, y, "o-", color=SERIES[index % len(SERIES)], linewidth=2, markersize=4.2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}×")
        axes.minorticks_off()

    caption = f"Adapters on {', '.join(targets)}, float32, as many times less than all parameters of the model."
    return figure("ranks", "Bytes saved against rank", series, caption, draw, "rank")
