"""The figures of the report: metrics and epsilon by round, as inline SVG in the page's own colours and fonts."""

import html
import math

from dplora_jax.files import number
from experiments.report_text import as_epsilon, show, show_metric

# Figures are drawn in these colours, then each is replaced by a CSS variable, so that one SVG serves light and dark.
INK, GRID, SERIES = "#010101", "#020202", tuple(f"#{i:02x}{i:02x}{i:02x}" for i in range(3, 11))
VARIABLES = {INK: "--soft", GRID: "--line"} | {colour: f"--series-{i}" for i, colour in enumerate(SERIES)}
BOOKKEEPING = {"round", "epsilon", "epsilon_max", "bytes_up_per_client", "bytes_down_per_client", "seconds"}
BOOKKEEPING |= {"examples_per_second", "finished", "survivors"}


def by_metric(rows: list[dict]) -> dict[str, tuple[list, list, list]]:
    """Each test metric by name, as its rounds, its values and the epsilon_max that each had cost."""
    series = {}
    for row in rows:
        for name, value in row.items():
            if name not in BOOKKEEPING and (value := number(value)) is not None:
                for column, entry in zip(
                    series.setdefault(name, ([], [], [])),
                    (row["round"], value, as_epsilon(row.get("epsilon_max"))),
                    strict=True,
                ):
                    column.append(entry)
    return series


def _svg(identity: str, label: str, draw, xlabel: str) -> str:
    """What `draw(axes)` draws, as inline SVG in the page's colours and fonts, the same bytes each time."""
    import io

    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, MaxNLocator

    settings = {"svg.hashsalt": identity, "svg.fonttype": "none", "font.size": 11, "axes.labelcolor": INK}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.0, 2.65), layout="constrained")
        axes = figure.add_subplot()
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
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    body = text[text.index(">") + 1 :].replace("xlink:href", "href")
    # Ids are the page's, not the figure's: two figures must not share one.
    for mark in ('id="', 'href="#', "url(#"):
        body = body.replace(mark, f"{mark}{identity}-")
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    width, height = figure.get_size_inches() * 72
    return f'<svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 {width:g} {height:g}">{body}'


def figure(
    identity: str, title: str, series: dict, caption: str, draw, xlabel: str = "round", broken: int | None = None
) -> str:
    """One card: a title, a key of the `series` by colour, the drawing and its caption; caption is HTML. The lines from number
    `broken` on, if any, are drawn in pieces, and their keys too."""
    pieces = range(len(series) if broken is None else broken, len(series))
    keys = "".join(
        f'<span><i{" class=broken" if i in pieces else ""} style="--c: var(--series-{i % len(SERIES)})"></i>'
        f"{html.escape(show_metric(name))}</span>"
        for i, name in enumerate(series)
    )
    drawing = _svg(identity, title, draw, xlabel)
    return (
        f'<figure><b>{html.escape(title)}</b><div class="keys">{keys}</div>{drawing}'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _plot_metrics(series: dict, against_epsilon: bool):
    """A drawing of every metric in `series`, per round or against epsilon_max."""

    def draw(axes):
        for i, (rounds, values, epsilons) in enumerate(series.values()):
            x = epsilons if against_epsilon else rounds
            style = "o-" if i == 0 else "s--"
            axes.plot(x, values, style, color=SERIES[i % len(SERIES)], linewidth=2, markersize=4.2)

    return draw


def _plot_epsilon(rows: list[dict], budget: float):
    """A drawing of epsilon per round: the largest client's line, the band of all clients, the budget."""

    def draw(axes):
        rounds = [row["round"] for row in rows]
        largest = [as_epsilon(row.get("epsilon_max")) for row in rows]
        smallest = [min(map(as_epsilon, row.get("epsilon") or [top])) for row, top in zip(rows, largest, strict=True)]
        axes.fill_between(rounds, smallest, largest, color=SERIES[0], alpha=0.2, linewidth=0)
        axes.plot(rounds, largest, color=SERIES[0], linewidth=2)
        if math.isfinite(budget):
            axes.axhline(budget, color=SERIES[1], linewidth=1.5, linestyle=(0, (4, 3)))
        axes.set_ylim(bottom=0)

    return draw


def figures(config: dict, rows: list[dict], private: bool) -> str:
    """Utility per round, epsilon per round, and each against the other, as far as the run has them."""
    if not rows:
        return '<p class="soft">No round has finished yet, so there is nothing to draw.</p>'
    metrics = by_metric(rows)
    # A perplexity and an accuracy share no axis.
    groups = [{k: v for k, v in metrics.items() if ("perplexity" in k) == low} for low in (False, True)]
    average = f" The metrics are the averaged adapter’s (ema {show(config['ema'])})." if config.get("ema") else ""
    cards = []
    for i, series in enumerate(filter(None, groups)):
        caption = f"Round 0 is the base model.{average}"
        draw = _plot_metrics(series, against_epsilon=False)
        cards.append(figure(f"utility{i}", "Utility per round", series, caption, draw, broken=1))
    if private and all(math.isfinite(as_epsilon(row.get("epsilon_max"))) for row in rows):
        budget = as_epsilon(config.get("epsilon"))
        keys = dict.fromkeys(["epsilon_max"] + ["budget (epsilon)"] * math.isfinite(budget))
        caption = (
            f"What the uploads so far have cost, at delta {show(config.get('delta'))}; the band spans all clients."
        )
        cards.append(figure("epsilon", "Epsilon per round", keys, caption, _plot_epsilon(rows, budget), broken=1))
        for i, series in enumerate(filter(None, groups)):
            caption = (
                "One point per evaluated round of this run; a run calibrated for a smaller epsilon draws another curve."
            )
            draw = _plot_metrics(series, against_epsilon=True)
            title = "Utility against epsilon"
            cards.append(figure(f"trade{i}", title, series, caption, draw, "epsilon_max", broken=1))
    words = "" if metrics else '<p class="soft">No round was evaluated on test data (eval_every).</p>'
    return f'{words}<div class="figures">{"".join(cards)}</div>'
