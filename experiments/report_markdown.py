"""The report of a run as Markdown, for a merge request or a wiki: the same facts as the page, without its plots."""

import html
import math
import re

from experiments import communication, sweep_report
from experiments.report_figures import by_metric
from experiments.report_text import accuracy_note, as_epsilon, as_markdown, repeated, show, show_bytes, show_metric
from experiments.summary import sent_uploads

MOST_ROUNDS = 12  # evaluated rounds that are listed
MOST_CLIENTS = 20


def _table(head, body):
    head, *body = [[as_markdown(cell) for cell in line] for line in (head, *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))


def _list(items):
    return "\n".join(f"- {as_markdown(item)}" for item in items)


def _value(value, name=""):
    """As `show`, of which Markdown escapes the text its own way."""
    return html.unescape(show(value, name))


def _code(text):
    """A block of code, whose fence is longer than any in the `text`."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}"


def text(config, rows, private, said, holds, audit, cells):
    """The report, from what `report.py` reads: flags, rounds, whether there is any privacy, the words of the ledger and whether
    it holds, the words of the audit (words may be empty), and a sweep's finished cells."""
    told = config.get("federation") or {}
    data, sent = told.get("data") or {}, told.get("communication") or {}
    parts = [
        as_markdown(f"# {config.get('model')} on {config.get('dataset')}"),
        as_markdown(data.get("description") or ""),
    ]
    if not private:
        parts.append("**There is no privacy in this run.** Its uploads and its adapter may reveal any record.")
    elif told["release"] != "for release":
        parts.append(f"**{as_markdown(told['release'])}**")
    done, planned = rows[-1]["round"] if rows else 0, config.get("rounds")
    if isinstance(planned, int) and done < planned:
        parts.append(f"**{done} of {planned} rounds.** The run has not reached its last round.")
    if data.get("synthetic"):
        parts.append("**Synthetic data.** The metrics show that the program works, not how well a model does.")
    if not holds:
        parts.append(f"**Do not rely on these figures.** {as_markdown(said)}")
    parts += ["## Utility by round", _rounds(rows)]
    last = by_metric(rows).get("accuracy")
    beside = accuracy_note(data, last[1][-1]) if last else ""
    parts += [f"The last accuracy: {beside}."] if beside else []
    parts += ["## What the guarantee says", _list(told.get("trust") or [])]
    parts += [as_markdown(words) for words in (told.get("accounting") or "", said, audit)]
    parts += ["## Many runs", sweep_report.markdown(cells).rstrip()] if cells else []
    parts += ["## Clients", _clients(told.get("clients") or [], rows)]
    uploads = sent_uploads(rows, config.get("clients") or 0)
    up, full = (sent.get(f"{name}_per_client_per_round") for name in ("bytes_up", "full_bytes"))
    if up and full:
        parts += [
            "## Communication",
            f"Each client sends {show_bytes(up)} a round instead of {show_bytes(full)} for full fine-tuning; all uploads "
            f"of the run together {show_bytes(uploads * up)} instead of {show_bytes(uploads * full)}.",
        ]
        targets, found = communication.of_run(config)
        parts.append(f"The same of the paper's models, adapters on {as_markdown(', '.join(targets))} in float32:")
        parts.append(_table(*communication.shown(found, config)))
    parts += ["## Method", _list(told.get("method") or [])]
    parts += ["## How to repeat it", _code(str(told.get("command") or ""))]
    parts.append(_list(f"{name}: {value}" for name, value in repeated(told)))
    flags = [f"{name}: {_value(value, 'flag')}" for name, value in config.items() if name != "federation"]
    parts += ["## Configuration", _list(flags)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _rounds(rows):
    found = by_metric(rows)
    rounds = sorted({number for numbers, _, _ in found.values() for number in numbers})
    step = max(1, math.ceil((len(rounds) - 1) / (MOST_ROUNDS - 1)))
    rounds = sorted({*rounds[::step], *rounds[-1:]})
    if not rounds:
        return "No round was evaluated on test data."
    spent = {row["round"]: show(row.get("epsilon_max"), "epsilon") for row in rows}
    body = []
    for number in rounds:
        values = [dict(zip(numbers, of, strict=True)).get(number) for numbers, of, _ in found.values()]
        body.append([str(number), spent[number], *("" if v is None else show(v, "metric") for v in values)])
    return _table(["round", "epsilon", *map(show_metric, found)], body)


def _clients(clients, rows):
    spent = (rows[-1].get("epsilon") or []) if rows else []
    body = []
    for index, client in enumerate(clients[:MOST_CLIENTS]):
        epsilon = spent[index] if len(spent) == len(clients) and rows[-1]["round"] else client.get("epsilon")
        names = ("records", "sampling_rate", "noise_multiplier")
        cells = [_value(client.get(name)) for name in names]
        body.append([str(client.get("client", index)), *cells, show(as_epsilon(epsilon), "epsilon")])
    more = f"\n\nand {len(clients) - MOST_CLIENTS:,} more." if len(clients) > MOST_CLIENTS else ""
    return _table(["client", "records", "sampling rate", "noise multiplier", "epsilon"], body) + more if body else ""
