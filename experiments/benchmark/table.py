"""What a benchmark found, as text: one cell's table, and a sweep's in Markdown and as a plot."""

import itertools

import numpy as np

from dplora_jax.privacy.clipping import FORMS
from experiments.benchmark.steps import LIMIT
from experiments.text import formats
from experiments.text.tables import Table

HEAD = [
    "step",
    "median s",
    "/ plain",
    "quartiles",
    "examples/s",
    "tokens/s",
    "of matmul",
    "peak",
    "/ plain",
    "compile s",
]


def ratios(measured, name, other="plain"):
    """The quartiles of `name`'s seconds over `other`'s of the same turn."""
    return np.quantile(np.array(measured[name]["seconds"]) / np.array(measured[other]["seconds"]), [0.25, 0.5, 0.75])


def share(measured, name):
    """The operations a second of a step over those of the plain matrix product of the same turn, the median."""
    rate = lambda row: row["flops"] / np.array(row["seconds"])  # noqa: E731
    return float(np.median(rate(measured[name]) / rate(measured[LIMIT])))


def lines(case, measured):
    """The table of one cell, line by line; a step without figures of memory is a peer's, and comes with ours over theirs."""
    body = []
    for name, row in measured.items():
        if name == LIMIT:
            continue
        seconds, (low, middle, high) = np.median(row["seconds"]), ratios(measured, name)
        rate = case.batch / seconds
        values = [name, f"{seconds:.3f}", f"{middle:.3f}", f"{low:.3f} .. {high:.3f}", f"{rate:.2f}"]
        values.append(f"{rate * case.length:.0f}")
        if "peak" in row:
            values += [f"{share(measured, name):.2f}", formats.size(row["peak"])]
            values += [f"{row['peak'] / measured['plain']['peak']:.3f}", f"{row['compile_seconds']:.1f}"]
        body.append(values + [""] * (len(HEAD) - len(values)))
    yield from Table(HEAD, body).text().splitlines()
    for name in (name for name, row in measured.items() if "peak" not in row and name != LIMIT):
        ours = "plain" if name.endswith("plain") else "auto"
        low, middle, high = ratios(measured, name, ours)
        yield f"{ours} does {middle:.2f} ({low:.2f} .. {high:.2f}) times the examples a second of {name}"
    limit = measured[LIMIT]
    yield f"the limit: a plain matrix product runs at {limit['flops'] / np.median(limit['seconds']) / 1e9:,.0f} GFLOP/s"


def fastest(measured, forms):
    """Of the `forms` that are here, the one of the least median ratio to the plain step, and that ratio."""
    return min(((float(ratios(measured, form)[1]), form) for form in forms if form in measured), default=(None, None))


def markdown(cells):
    """A sweep's cells [(name {flag: value}, measured)] as a Markdown table, and how often the automatic choice was the fastest
    form or within 5 % of it."""
    if not cells:
        return "no cells"
    names = list(cells[0][0])
    forms = [name for name in cells[0][1] if name in FORMS]
    peers = [name for name, row in cells[0][1].items() if "peak" not in row and name != LIMIT]
    head = [*names, "plain s", *(f"{form}: time, memory" for form in forms), "fastest", "plain of matmul"]
    head += [f"auto / {peer}, examples/s" for peer in peers]
    rows, near, counted = [], 0, 0
    for name, measured in cells:
        row = [str(name[flag]) for flag in names] + [f"{np.median(measured['plain']['seconds']):.2f}"]
        for form in forms:
            memory = measured[form]["peak"] / measured["plain"]["peak"] if form in measured else None
            row.append("" if memory is None else f"{ratios(measured, form)[1]:.3f}, {memory:.3f}")
        best, form = fastest(measured, [form for form in forms if form != "auto"])
        if "auto" in measured and best is not None:
            near, counted = near + (float(ratios(measured, "auto")[1]) <= 1.05 * best), counted + 1
        row += [form or "", f"{share(measured, 'plain'):.2f}"]
        row += [
            f"{ratios(measured, peer, 'auto')[1]:.2f}" if {peer, "auto"} <= measured.keys() else "" for peer in peers
        ]
        rows.append(row)
    table = Table(head, rows).markdown()
    if not counted:
        return table
    return f"{table}\n\nThe automatic choice was the fastest form, or within 5 % of it, in {near} of {counted} cells."


def plot(cells, path):
    """Draw each form's time over the plain step's for every cell into `path` (.svg or .png)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.32 * len(cells) + 1.4), layout="constrained")
    axes, marks = figure.add_subplot(), itertools.cycle("osD^v")
    forms = dict.fromkeys(form for _, measured in cells for form in measured if form in FORMS)
    for form, mark in zip(forms, marks, strict=False):
        points = [(ratios(measured, form)[1], i) for i, (_, measured) in enumerate(cells) if form in measured]
        axes.plot(*zip(*points, strict=True), mark, label=form, markersize=5, alpha=0.8)
    axes.axvline(1, color="0.6", linewidth=1)
    axes.set_yticks(range(len(cells)), [", ".join(f"{k} {v}" for k, v in name.items()) for name, _ in cells])
    axes.invert_yaxis()
    axes.set_xlabel("time over the plain step's")
    axes.legend(frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
