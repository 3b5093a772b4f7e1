"""How the report looks and how it writes a number: its style sheet, and values as escaped text."""

import html
import math
import re

from dplora_jax.files import to_json

STYLE = """
:root { color-scheme: light dark; --paper: #faf9f6; --card: #fff; --ink: #1c2024; --soft: #5b636c; --line: #dfddd6;
  --accent: #0b6b62; --series-0: #0b6b62; --series-1: #c2571a; --series-2: #5b4bb5; --series-3: #8a6d00;
  --series-4: #9c2f6b; --series-5: #2f6fb0; --series-6: #5f7d1f; --series-7: #6b6b6b; --bad: #a3161c;
  --bad-paper: #fdecea; --care: #7a4b00; --care-paper: #fff3d6; --note: #24507f; --note-paper: #e8f0fa }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --card: #1c2024; --ink: #e9e7e2; --soft: #a2a9b0;
  --line: #343a40; --accent: #5cc9ba; --series-0: #5cc9ba; --series-1: #f2995c; --series-2: #aa9df5;
  --series-3: #dcbf52; --series-4: #e58fc0; --series-5: #8fc1f5; --series-6: #b5d06c; --series-7: #b9b9b9;
  --bad: #ffb4ae; --bad-paper: #4a1718; --care: #ffd58a; --care-paper: #40300f; --note: #a9cdf5;
  --note-paper: #1a2f47 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto,
  Helvetica, Arial, sans-serif; -webkit-text-size-adjust: 100% }
main { max-width: 1120px; margin: 0 auto; padding: clamp(1.25rem, 4vw, 3.5rem) clamp(1rem, 4vw, 2.5rem) 4rem }
h1, h2, .value { font-family: Charter, "Iowan Old Style", "Palatino Linotype", Palatino, Georgia, serif;
  line-height: 1.15; letter-spacing: -.01em; text-wrap: balance; overflow-wrap: anywhere }
h1 { font-size: clamp(1.8rem, 5vw, 2.9rem); margin: .2rem 0 .5rem; font-weight: 600 }
h2 { font-size: 1.45rem; margin: 3rem 0 .8rem; font-weight: 600 }
p, ul { max-width: 46rem; margin: 0 0 .8rem }
ul { padding-left: 1.2rem }
li { margin: .3rem 0 }
li::marker { color: var(--accent) }
.kicker { color: var(--accent); font-size: .8rem; font-weight: 650; letter-spacing: .09em; text-transform:
  uppercase; margin: 0 }
.soft, figcaption, .note { color: var(--soft) }
.soft { overflow-wrap: anywhere }
.strip, .figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr))
  }
.strip { margin: 1.8rem 0 1.2rem }
.figures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 310px), 1fr)) }
.tile, figure, .box, details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin:
  0 }
.tile { padding: 1rem 1.15rem 1.05rem }
.label { font-size: .85rem; font-weight: 600 }
.note { font-size: .85rem; line-height: 1.4 }
.value { font-size: 2.35rem; font-weight: 600; margin: .3rem 0 .35rem; font-variant-numeric: lining-nums }
.lost { color: var(--bad) }
.band { border-left: 5px solid; border-radius: 6px; padding: .8rem 1.1rem; margin: .7rem 0; overflow-wrap: anywhere
  }
.bad { color: var(--bad); background: var(--bad-paper); font-size: 1.15rem }
.bad b { font-size: 1.5rem; display: block }
.care { color: var(--care); background: var(--care-paper) }
.info { color: var(--note); background: var(--note-paper) }
figure { padding: 1rem 1rem .9rem; min-width: 0; max-width: 30rem }
figure svg { display: block; width: 100%; max-width: 100%; height: auto }
figure svg text { font-family: inherit !important }
figcaption { font-size: .85rem; line-height: 1.45; margin-top: .5rem }
figure b { display: block; margin-bottom: .1rem }
.keys { font-size: .85rem; color: var(--soft); margin: 0 0 .4rem; min-height: 1.4em }
.keys span { margin-right: 1rem; white-space: nowrap }
.keys i { display: inline-block; width: 1.1em; height: .22em; border-radius: 2px; margin-right: .4em;
  vertical-align: .25em; background: var(--c) }
.keys .broken { background: repeating-linear-gradient(90deg, var(--c) 0 .28em, transparent .28em .41em) }
.box { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .5rem .95rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line) }
thead th { border-top: 0; color: var(--soft); font-weight: 600; font-size: .82rem }
tbody th { font-weight: 400 }
tr > :first-child { text-align: left }
tfoot { background: var(--paper); font-weight: 600 }
.box + p { margin-top: .7rem }
.box + .figures, .figures + .box, .figures + details { margin-top: 1rem }
.words td { text-align: left; white-space: normal; overflow-wrap: anywhere }
.words th { vertical-align: top }
pre.box { margin-bottom: 1rem }
sup { line-height: 0 }
header p { max-width: none }
h1 span { display: inline-block; max-width: 100% }
pre { margin: 0 0 1rem; padding: .9rem 1.1rem; white-space: pre; overflow-x: auto }
code, pre, .words th { font: .88rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace
  }
details { overflow: hidden }
details .box { border: 0; border-radius: 0; border-top: 1px solid var(--line) }
summary { cursor: pointer; padding: .8rem 1rem; font-weight: 600 }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line) }
@media print { .tile, figure, .box { break-inside: avoid } body { background: none } }
"""


def as_epsilon(value) -> float:
    """`value` as a number; null, "inf" and what is no number are infinite, so that a gap never reads as privacy."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.inf
    return math.inf if math.isnan(number) else number


def show(value, name: str = "") -> str:
    """`value` as escaped text: an epsilon rounded up, never down; a flag to its last digit; else four digits or so."""
    if name == "epsilon":
        number = as_epsilon(value)
        # The 1e-6 keeps 8.00 from becoming 8.01 by a float's last bit.
        return "∞" if math.isinf(number) else f"{math.ceil(number * 100 - 1e-6) / 100:.2f}"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if name == "flag" and isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3f}" if name == "metric" and abs(value) < 10 else f"{value:.4g}"
    return html.escape(value if isinstance(value, str) else to_json(value))


def as_markdown(text) -> str:
    """`text` so that it reads as itself in a line or a table's cell of Markdown: on one line, without HTML, code, links or bars.

    >>> as_markdown("<b>a|b</b>")
    '&lt;b&gt;a\\\\|b&lt;/b&gt;'
    """
    return re.sub(r"([\\`*|\[\]])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def accuracy_note(data: dict, accuracy: float) -> str:
    """How sure an accuracy on the public test set is, and what its commonest label would have, from config.json's `data`."""
    records, commonest = data.get("test_records"), data.get("commonest_label")
    if not records or not 0 <= accuracy <= 1:
        return ""
    note = f"± {1.96 * math.sqrt(accuracy * (1 - accuracy) / records):.3f} (95 %) on {show(records)} test records"
    return note + (f"; the commonest label {show(commonest, 'metric')}" if commonest else "")


METRICS = {
    "accuracy": "accuracy", "macro_f1": "macro-F1", "perplexity": "perplexity", "token_f1": "token F1", "rouge_l": "ROUGE-L",
}  # fmt: skip


def show_metric(metric: str) -> str:
    """A metric's name as it is written."""
    return METRICS.get(metric, metric.replace("_", " "))


def show_bytes(count) -> str:
    """A count of bytes in decimal units, as networks are sold."""
    if not isinstance(count, (int, float)):
        return "unknown"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def repeated(told: dict) -> list[tuple]:
    """(name, value) of what another party compares to repeat a run: where it ran, and the SHA-256 of the base's files."""
    digests = {f"SHA-256 of the base's {name}": value for name, value in (told.get("base_files") or {}).items()}
    return [*((told.get("environment") or {}) | digests).items()]
