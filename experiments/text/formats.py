"""How figures are written, the same in a terminal, in Markdown and in HTML: numbers, epsilons, metrics, bytes; no JAX."""

import html
import math
import re

from dplora_jax.files import to_json

METRICS = {
    "accuracy": "accuracy", "macro_f1": "macro-F1", "perplexity": "perplexity", "token_f1": "token F1", "rouge_l": "ROUGE-L",
}  # fmt: skip
# On records that are kept back (`private_test`); not those of the public test set.
PRIVATE_METRICS = {
    f"private_{name}": f"{METRICS[name]} on private records" for name in ("accuracy", "macro_f1", "perplexity")
}


def number(value):
    """A number of four digits, whole numbers in full; other values as their text.

    >>> number(1234567), number(0.123456), number(None), number(True)
    ('1,234,567', '0.1235', 'none', 'true')
    """
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else to_json(value)


def setting(value):
    """A flag's value, to its last digit."""
    return repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else number(value)


def epsilon(value, digits=2):
    """An epsilon, rounded up and never down.

    >>> epsilon(7.9912), epsilon(8.0), epsilon(math.inf)
    ('8.00', '8.00', '∞')
    """
    if not math.isfinite(value):
        return "∞"
    scale = 10**digits  # the 1e-6 keeps 8.00 from becoming 8.01 by a float's last bit
    return f"{math.ceil(value * scale - 1e-6) / scale:.{digits}f}"


def lower_bound(value):
    """A lower bound of an epsilon, rounded down; a dash where there is none."""
    return "—" if value is None else f"{math.floor(value * 100) / 100:.2f}"


def metric(value, name=""):
    """A metric's value: three decimals, of a perplexity or a value from 10 on fewer."""
    if not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{2 if 'perplexity' in name else 3}f}" if abs(value) < 10 else f"{value:.4g}"


def metric_name(name):
    """A metric's name in words."""
    return (METRICS | PRIVATE_METRICS).get(name, name.replace("_", " "))


def size(count):
    """A count of bytes in decimal units, as networks and memory are sold.

    >>> size(78348), size(16 * 2**30), size(None)
    ('78.3 kB', '17.2 GB', 'unknown')
    """
    if count is None:
        return "unknown"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def span(values, form=number):
    """Values as the least and the largest of them, or as the only one.

    >>> span([0.2, 0.4, 0.3])
    '0.2 to 0.4'
    """
    return " to ".join(dict.fromkeys(form(value) for value in (min(values), max(values))))


def accuracy_note(data, accuracy):
    """How sure an accuracy on the public test set is, and what its commonest label would reach, from config.json's `data`."""
    records, commonest = data["test_records"], data["commonest_label"]
    if not records or not 0 <= accuracy <= 1:
        return ""
    note = f"± {1.96 * math.sqrt(accuracy * (1 - accuracy) / records):.3f} (95 %) on {number(records)} test records"
    return note + (f"; the commonest label {metric(commonest)}" if commonest else "")


def markdown(text):
    """`text` so that it reads as itself in a line or a table's cell of Markdown: no HTML, code, link, heading or item of a list.

    >>> markdown("<b>a|b</b>"), markdown("# a"), markdown("1. a")
    ('&lt;b&gt;a\\\\|b&lt;/b&gt;', '\\\\# a', '1\\\\. a')
    """
    line = html.escape(" ".join(str(text).split()), quote=False)
    line = re.sub(r"([\\`*|\[\]])", r"\\\1", line)
    return re.sub(r"^(\d*)(#{1,6}|[-+]|[.)])(?=\s|$)", r"\1\\\2", line)
