"""The page that tells a run: its utility, what privacy it cost, what was sent, and how to repeat it.

    python -m experiments.report runs/finance

reads the workdir's public files, `config.json`, `metrics.jsonl` and the ledger, and writes `report.html` beside them: one file
that needs no network, no script and no font. The same files give the same bytes.
"""

import html
import json
import math
import pathlib
import statistics
import sys

from dplora_jax.errors import InputError
from dplora_jax.privacy.chain import replace_durably
from dplora_jax.privacy.ledger import FILE
from experiments import ledger
from experiments.report_figures import by_metric, figures
from experiments.report_text import STYLE, as_epsilon, show, show_bytes, show_metric
from experiments.summary import sent_uploads

CLIENT_COLUMNS = {
    "client": "client",
    "records": "records (n)",
    "sampling_rate": "sampling_rate (q)",
    "capacity": "capacity",
    "noise_multiplier": "noise_multiplier (σ)",
    "epsilon": "epsilon",
    "weight": "weight",
    "rounds": "rounds taken part in",
    "bytes_up": "bytes up a round",
}
VARIED = ("rounds", "bytes_up")  # shown where clients differ
MOST_CLIENTS, FIRST_CLIENTS = 50, 20


def _read(workdir: pathlib.Path) -> tuple[dict, list[dict]]:
    """The flags and the rounds so far. Raises InputError for a missing or broken file."""
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no flags")
        path = workdir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # A running program may be in the middle of its last line.
        if lines and not lines[-1].rstrip().endswith("}"):
            lines.pop()
        rows = sorted((json.loads(line) for line in lines if line.strip()), key=lambda row: row["round"])
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the workdir of a run that has started.") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): run the same command again to rebuild it.") from None
    return config, rows


def _tile(label: str, value: str, note: str, lost: bool = False) -> str:
    mark = " lost" if lost else ""
    return (
        f'<div class="tile"><div class="label">{label}</div><div class="value{mark}">{value}</div>'
        f'<div class="note">{note}</div></div>'
    )


def _strip(config: dict, rows: list[dict], private: bool) -> str:
    """The big figures: the last evaluated round's metrics, epsilon, and what one client sends."""
    told, metrics, tiles = config.get("federation") or {}, by_metric(rows), []
    records = (told.get("data") or {}).get("test_records")
    for name, (rounds, values, _) in list(metrics.items())[:3]:
        note = f"round {rounds[-1]}"
        if name == "accuracy" and records and 0 <= values[-1] <= 1:
            spread = 1.96 * math.sqrt(values[-1] * (1 - values[-1]) / records)
            note += f", ± {spread:.3f} (95 %) on {show(records)} test records"
        note += f"; base model {show(values[0], 'metric')}" if rounds[0] == 0 and len(rounds) > 1 else ""
        tiles.append(_tile(f"test {html.escape(show_metric(name))}", show(values[-1], "metric"), note))
    if not metrics:
        tiles.append(_tile("test metrics", "—", "no round was evaluated on test data"))
    planned = config.get("rounds")
    if not private:
        tiles.append(_tile("epsilon", "∞", f"no privacy: trust {show(config.get('trust'))}", lost=True))
    elif rows:
        note = f"epsilon_max over {show(config.get('clients'))} clients, at delta {show(config.get('delta'))},"
        note += f" after round {rows[-1]['round']} of {show(planned)}"
        budget = show(config.get("epsilon"), "epsilon")
        note += f"; budget {budget}" if budget != "∞" else ""
        tiles.append(_tile("epsilon", show(rows[-1].get("epsilon_max"), "epsilon"), note))
    sent = told.get("communication") or {}
    if sent.get("ratio"):
        note = f"{show_bytes(sent.get('bytes_up_per_client_per_round'))} per client and round instead of "
        note += f"{show_bytes(sent.get('full_bytes_per_client_per_round'))} for full fine-tuning"
        ratio = float(f"{sent['ratio']:.3g}")
        tiles.append(_tile("bytes sent", f"{ratio:,.5g}× less", note))
    return f'<div class="strip">{"".join(tiles)}</div>'


def _bands(config: dict, rows: list[dict], private: bool, broken: str) -> str:
    """What a reader must know before believing a figure: no privacy, not for release, synthetic, unfinished."""
    told, bands = config.get("federation") or {}, []
    if broken:
        bands.append(("bad", f"<b>Do not rely on these figures.</b> {show(broken)}"))
    if not private:
        bands.append(
            ("bad", "<b>There is no privacy in this run.</b> Its uploads and its adapter may reveal any record.")
        )
    elif told["release"] != "for release":
        bands.append(("care", f"<b>{show(told['release'])}</b>"))
    if config.get("trust") == "distributed":
        bands.append(
            (
                "info",
                "<b>Secure aggregation is simulated.</b> The guarantee is for those who see totals alone; a deployment "
                "needs a real protocol.",
            )
        )
    if (told.get("data") or {}).get("synthetic"):
        bands.append(
            ("info", "<b>Synthetic data.</b> The metrics show that the program works, not how well a model does.")
        )
    done, planned = rows[-1]["round"] if rows else 0, config.get("rounds")
    if isinstance(planned, int) and done < planned:
        bands.append(("info", f"<b>{done} of {planned} rounds.</b> The run has not reached its last round."))
    return "".join(f'<div class="band {kind}" role="note">{text}</div>' for kind, text in bands)


def _table(head: list[str], body: list[list[str]], foot: list[list[str]] = ()) -> str:
    """A table in its own scrolling box; every cell is HTML already."""

    def line(cells):
        return f'<tr><th scope="row">{cells[0]}</th>{"".join(f"<td>{cell}</td>" for cell in cells[1:])}</tr>'

    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    top = f"<thead><tr>{top}</tr></thead>" if head else ""
    end = f"<tfoot>{''.join(map(line, foot))}</tfoot>" if foot else ""
    kind = "" if head else ' class="words"'
    return (
        f'<div class="box" tabindex="0"><table{kind}>{top}<tbody>{"".join(map(line, body))}</tbody>{end}</table></div>'
    )


def _charged(clients: list[dict], rows: list[dict]) -> list[dict]:
    """The clients with the epsilon that they have spent by the last round, in place of the one that was planned."""
    spent = (rows[-1].get("epsilon") or []) if rows and rows[-1].get("round") else []
    return (
        [client | {"epsilon": value} for client, value in zip(clients, spent, strict=True)]
        if len(spent) == len(clients)
        else clients
    )


def _clients(clients: list[dict]) -> str:
    """A row per client, or the first ones and the spread of all."""
    names = [name for name in CLIENT_COLUMNS if name not in VARIED or len({client.get(name) for client in clients}) > 1]
    shown = clients if len(clients) <= MOST_CLIENTS else clients[:FIRST_CLIENTS]
    body = [[show(client.get(name), name) for name in names] for client in shown]
    foot, words = [], ""
    if len(shown) < len(clients):
        words = (
            f"<p class='soft'>The first {len(shown)} of {len(clients):,} clients; min, median and max are over all.</p>"
        )
        for title, of in (("min", min), ("median", statistics.median), ("max", max)):
            foot.append([title])
            for name in names[1:]:
                values = [as_epsilon(v) if name == "epsilon" else v for v in (client.get(name) for client in clients)]
                values = [v for v in values if isinstance(v, (int, float))]
                foot[-1].append(show(of(values) if values else None, name))
    return _table([CLIENT_COLUMNS[name] for name in names], body, foot) + words


def _communication(config: dict, rows: list[dict], sent: dict) -> str:
    """What travels, beside what full fine-tuning would send."""
    up, full = sent.get("bytes_up_per_client_per_round"), sent.get("full_bytes_per_client_per_round")
    down, times = sent.get("bytes_down_per_client_per_round"), (rows[-1]["round"] if rows else 0)
    clients = config.get("clients") or 0
    uploads = sent_uploads(rows, clients)

    def total(count):
        return show_bytes(count * uploads) if count is not None else "unknown"

    body = [
        ["parameters trained and sent", show(sent.get("adapter_parameters")), show(sent.get("full_parameters"))],
        ["bytes up, per client and round", show_bytes(up), show_bytes(full)],
        ["bytes down, per client and round", show_bytes(down), show_bytes(full)],
        [f"bytes up, {uploads:,} uploads in {times} rounds", total(up), total(full)],
    ]
    return _table(["what travels", "adapter (this run)", "full fine-tuning"], body)


def _ledger(workdir: pathlib.Path) -> tuple[str, bool]:
    """What the ledger says, and whether it holds; nothing where there is none yet."""
    if not (workdir / FILE).exists():
        return "", True
    try:
        return f"Ledger: {ledger.verify(workdir).words()}.", True
    except InputError as error:
        return f"The ledger does not hold: {error}", False


def _guarantee(config: dict, rows: list[dict], told: dict, private: bool, said: str) -> str:
    """The statements of trust, the definition with this run's numbers, how it was accounted, and what the ledger says."""
    parts = ["<p><b>Nothing: no finite epsilon holds for this run.</b></p>"] if not private else []
    parts.append(_list(told.get("trust") or []))
    if private and rows and math.isfinite(as_epsilon(rows[-1].get("epsilon_max"))):
        parts.append(
            "<p>In symbols: for neighbouring data D and D′, and for every set S of what the adversary may see, "
            "P(S | D) ≤ e<sup>epsilon</sup> P(S | D′) + delta, and the same with D and D′ exchanged, with "
            f"epsilon = {show(rows[-1]['epsilon_max'], 'epsilon')} and delta = {show(config.get('delta'))}"
            " for the client that spent most.</p>"
        )
    if told.get("accounting"):
        parts.append(f'<p class="soft">Accounting: {show(told["accounting"])}</p>')
    if said:
        parts.append(f'<p class="soft">{show(said)}</p>')
    return "".join(parts)


def _list(items) -> str:
    return f"<ul>{''.join(f'<li>{show(item)}</li>' for item in items)}</ul>" if items else ""


def _repeat(rows: list[dict], told: dict) -> str:
    """The command, where it ran and how long it took."""
    words = [[show(name), show(value)] for name, value in (told.get("environment") or {}).items()]
    seconds = sum(row.get("seconds") or 0 for row in rows)
    if seconds:
        words.append(
            [
                "time",
                f"{seconds / 60:.1f} minutes for {rows[-1]['round']} rounds, compilation and evaluation not counted",
            ]
        )
    command = f'<pre class="box" tabindex="0"><code>{show(told["command"])}</code></pre>' if told.get("command") else ""
    return command + (_table([], words) if words else "")


def _page(config: dict, rows: list[dict], said: str, holds: bool) -> str:
    """The whole page as HTML; `said` is what the ledger says, and `holds` whether it does."""
    told = config.get("federation") or {}
    private = config.get("trust") != "none" and told.get("release") is not None
    private = private and (not rows or math.isfinite(as_epsilon(rows[-1].get("epsilon_max"))))
    model, dataset = show(config.get("model")), show(config.get("dataset"))
    title, heading = f"{model} on {dataset}", f"<span>{model}</span> on <span>{dataset}</span>"
    data = told.get("data") or {}
    facts = [
        f"{name} {show(config[name])}" for name in ("clients", "rounds", "rank", "targets", "trust") if name in config
    ]
    facts += [
        f"{data[name]:,} {name.replace('_', ' ')}" for name in ("train_records", "test_records") if data.get(name)
    ]
    flags = [[show(name), show(value, "flag")] for name, value in config.items() if name != "federation"]
    sections = [
        ("Utility and what it cost", figures(config, rows, private)),
        ("What the guarantee says", _guarantee(config, rows, told, private, said)),
        ("Clients", _clients(_charged(told.get("clients") or [], rows))),
        ("Communication", _communication(config, rows, told.get("communication") or {})),
        ("Method", _list(told.get("method") or [])),
        ("How to repeat it", _repeat(rows, told)),
        ("Configuration", f"<details><summary>Every flag ({len(flags)})</summary>{_table([], flags)}</details>"),
    ]
    body = "".join(f"<section><h2>{name}</h2>{text}</section>\n" for name, text in sections if text)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}: DP-LoRA report</title><style>{STYLE}</style></head><body><main>
<header><p class="kicker">Federated private LoRA</p><h1>{heading}</h1>
<p class="soft">{show(data.get("description") or "")}</p><p class="soft">{" · ".join(facts)}</p></header>
{_strip(config, rows, private)}{_bands(config, rows, private, "" if holds else said)}
{body}<footer class="soft">Written by dplora_jax from config.json, metrics.jsonl and the ledger alone.</footer>
</main></body></html>
"""


def write(workdir: pathlib.Path) -> pathlib.Path:
    """Write `workdir/report.html` whole or not at all, and return its path. Raises InputError for a broken workdir."""
    workdir = pathlib.Path(workdir)
    page = _page(*_read(workdir), *_ledger(workdir))
    path = workdir / "report.html"
    replace_durably(path, page)
    return path


def main(arguments: list[str]) -> int:
    """Write the report of the one workdir named; 2 and a sentence on stderr if that cannot be."""
    try:
        if len(arguments) != 1:
            raise InputError("Give one workdir: python -m experiments.report WORKDIR.")
        print(write(pathlib.Path(arguments[0])))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
