"""What a sweep found, as tables and plots: means and standard deviations over seeds, cases against each varied flag."""

import math
import statistics

from experiments.report import templates
from experiments.report.figures import SERIES, figure
from experiments.text import formats
from experiments.text.tables import Table

# Of a line: what was found; the rest names its cell.
OUTCOME = ("metrics", "epsilon_max", "bytes_up_per_client", "seconds", "of", "settings", "release", "commonest_label")
BASE = "base model"
ANY = "any"  # the value of a flag that a case does not depend on
MOST_LINES = len(SERIES)  # of a plot
SOLID = MOST_LINES // 2  # of these
SHOWN = tuple(formats.METRICS)  # first, where a line has them


def metrics(lines):
    """The names of all metrics of `lines`, the usual ones first."""
    names = list(dict.fromkeys(name for line in lines for name in line["metrics"]))
    return [name for name in SHOWN if name in names] + [name for name in names if name not in SHOWN]


def varied(lines):
    """The flags that name `lines` beside case and seed."""
    return [name for name in lines[0] if name not in ("case", "seed", "config", *OUTCOME)] if lines else []


def groups(lines):
    """`lines` by what was varied in them: a file may hold several sweeps."""
    groups = {}
    for line in lines:
        groups.setdefault(tuple(varied([line])), []).append(line)
    return list(groups.values())


def columns(lines):
    """The choices of varied flags that `lines` have, as tuples in the order of `varied`; numbers rise, whenever they were run."""
    names = varied(lines)
    column_names = dict.fromkeys(tuple(line[name] for name in names) for line in lines)
    settled = [column for column in column_names if ANY not in column]
    numbers = {value: _number(value) for column in settled for value in column}
    for index in reversed(range(len(names))):
        if all(numbers[column[index]] is not None for column in settled):
            settled.sort(key=lambda column: numbers[column[index]])
    return settled or list(column_names)


def metric_values(lines, case, column, metric):
    """The values over seeds of `case` at `column`; a case that does not depend on a flag has its value everywhere."""
    names = varied(lines)
    return [
        float(line["metrics"][metric])
        for line in lines
        if line["case"] == case
        and metric in line["metrics"]
        and all(line[name] in (value, ANY) for name, value in zip(names, column, strict=True))
    ]


def table(lines):
    """The Table of `lines`: a row a case, a column for each metric of each choice of varied flags."""
    names, column_names = varied(lines), columns(lines)
    titles = [", ".join(f"{n} {v}" for n, v in zip(names, column, strict=True)) for column in column_names]
    header = ["case", *(f"{title} {formats.metric_name(m)}".strip() for title in titles for m in metrics(lines))]
    rows = [
        [
            case,
            *(
                spread(metric_values(lines, case, column, metric), metric)
                for column in column_names
                for metric in metrics(lines)
            ),
        ]
        for case in dict.fromkeys(line["case"] for line in lines)
    ]
    return Table(header, rows)


def spread(values, metric=""):
    """Mean ± standard deviation of `values`; nothing of none, and of one no deviation."""
    if not values:
        return ""
    digits = 2 if "perplexity" in metric else 3
    deviation = f" ± {_deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def _deviation(values):
    """Their standard deviation: nan where one is not finite, which `statistics` cannot take, and 0 of one alone."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0


def place(line):
    """Where in a table a finished cell stands, beside those of other seeds: its case and the values that were varied."""
    return tuple((name, line[name]) for name in ("case", *varied([line])))


def markdown(lines):
    """A table for each group of `lines`, and that none of it is for release."""
    tables = "\n\n".join(table(group).markdown() for group in groups(lines))
    words = formats.markdown(_told(lines))
    return f"{tables}\n\n{words} Seeded, so that the noise can be made again, and so NOT FOR RELEASE.\n"


def _told(lines):
    """What the means are taken over, and what saying the commonest label each time would come to."""
    seeds = ", ".join(str(seed) for seed in sorted({line["seed"] for line in lines}))
    runs, least = dict.fromkeys(line["of"] for line in lines if line.get("of")), []
    for run in runs:
        shares = {x["seed"]: x["commonest_label"] for x in lines if x.get("of") == run and x.get("commonest_label")}
        run_name = f" of {run}" if len(runs) > 1 else ""
        least += [f" Always the commonest label{run_name}: accuracy {spread(list(shares.values()))}."] if shares else []
    words = f"{'; '.join(runs)}: means" if runs else "Means"
    return f"{words} ± standard deviations over seeds {seeds}.{''.join(least)}"


def _axis(values):
    """(numbers, labels or None) of a flag's values on an axis; inf stands one step beyond the largest."""
    numbers = [_number(value) for value in values]
    if any(number is None for number in numbers):
        return list(range(len(values))), values
    finite = sorted(n for n in numbers if math.isfinite(n))
    if len(finite) == len(numbers):
        return numbers, None
    step = finite[-1] - finite[-2] if len(finite) > 1 else 1.0
    return [n if math.isfinite(n) else finite[-1] + step for n in numbers], [f"{v}".replace("inf", "∞") for v in values]


def _number(value):
    text = str(value).rpartition(":")[2] if ":" in str(value) else value
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def plots(lines):
    """A figure of each usual metric against each varied flag, the others held at their first value; error bars over seeds."""
    names, column_names, plots = varied(lines), columns(lines), []
    drawn = [line["case"] for line in lines if line["case"] != BASE]  # which lies far below, where nothing else is
    cases = list(dict.fromkeys(drawn))[:MOST_LINES]
    for index, name in enumerate(names):
        line_of = [c for c in column_names if all(c[i] == column_names[0][i] for i in range(len(names)) if i != index)]
        if len(line_of) < 2:
            continue
        for metric in (m for m in SHOWN if any(m in line["metrics"] for line in lines)):
            held = ", ".join(
                f"{n} {v}" for i, (n, v) in enumerate(zip(names, column_names[0], strict=True)) if i != index
            )
            caption = f"Mean and standard deviation over seeds{f', at {held}' if held else ''}."
            draw = _errors(lines, cases, line_of, index, metric)
            title = f"{formats.metric_name(metric)} against {name}"
            plots.append(
                figure(
                    f"sweep-{'-'.join(names)}-{name}-{metric}", title, dict.fromkeys(cases), caption, draw, name, SOLID
                )
            )
    return plots


def _errors(lines, cases, line_of, index, metric):
    values = [column[index] for column in line_of]

    def draw(axes):
        places, labels = _axis(values)
        if labels is None and min(places) > 0 and max(places) / min(places) >= 100:
            axes.set_xscale("log")
        for number, case in enumerate(cases):
            held = [metric_values(lines, case, column, metric) for column in line_of]
            at = [(x, v) for x, v in zip(places, held, strict=True) if v]
            if not at:
                continue
            x, kept = zip(*at, strict=True)
            means = [statistics.mean(v) for v in kept]
            bars = [_deviation(v) for v in kept]
            style = "o-" if number < SOLID else "s:"
            colour = SERIES[number % len(SERIES)]
            axes.errorbar(x, means, bars, fmt=style, color=colour, linewidth=2, markersize=4.2, capsize=3)
        if labels is not None:
            axes.set_xticks(places, labels)

    return draw


def contents(lines):
    """What a page shows of `lines`: what the means are taken over, and plots and a table for each group."""
    return {
        "words": _told(lines),
        "groups": [{"figures": plots(group), "table": table(group)} for group in groups(lines)],
    }


def page(lines, config, argv):
    """A whole page: what was varied, the plots, the table, and how to repeat it."""
    sent = [line["bytes_up_per_client"] for line in lines if line.get("bytes_up_per_client")]
    header_words = [f"{len(lines)} cells", f"seeds {', '.join(map(str, sorted({line['seed'] for line in lines})))}"]
    header_words += [f"{formats.span(sent, formats.size)} sent by a client"] if sent else []
    command = "python -m experiments.sweep " + " ".join(_quoted(word) for word in argv)
    title = f"{config.base.name} on {config.data.dataset}: a sweep"
    return templates.html(
        "sweep.html.j2", {"title": title, "facts": header_words, "sweep": contents(lines), "command": command}
    )


def _quoted(word):
    return f"'{word}'" if any(c in word for c in " |:") else word
