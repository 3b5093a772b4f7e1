"""The page that tells a run: its utility, what privacy it cost, what was sent, and how to repeat it.

    python -m experiments.report runs/finance [--sweep=sweep.jsonl]

reads the workdir's public files, `config.json`, `metrics.jsonl` and the ledger, the audit in `runs/finance-audit` if there is
one, and the finished cells of a sweep if one is named, and writes `report.html` beside them: one file that needs no network, no
script and no font; and `report.md`. The same files give the same bytes.
"""

import html
import math
import pathlib
import sys

from dplora_jax import errors, files, guard
from dplora_jax.errors import InputError
from dplora_jax.privacy.chain import replace_durably
from dplora_jax.privacy.ledger import FILE
from experiments import cli, exits, ledger, report_markdown, sweep, sweep_report
from experiments.report_figures import by_metric, figures
from experiments.report_sections import against_rank, audits, charged, clients_table, communication, table
from experiments.report_text import STYLE, accuracy_note, as_epsilon, repeated, show, show_bytes, show_metric


def _read(workdir: pathlib.Path) -> tuple[dict, list[dict]]:
    """The flags and the rounds so far. Raises InputError for a missing or broken file."""
    path = workdir / "config.json"
    if not path.exists():
        raise InputError(f"{path} does not exist: give the workdir of a run that has started.")
    try:
        config = files.read_json(path)
        path = workdir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # A running program may be in the middle of its last line.
        if lines and not lines[-1].rstrip().endswith("}"):
            lines.pop()
        rows = [files.parse_json(line.encode(), path) for line in lines if line.strip()]
        rows.sort(key=lambda row: row["round"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        broken = InputError(f"{path} cannot be read ({error}): run the same command again to rebuild it.")
        raise errors.storage(error) or broken from None
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
    for name, (rounds, values, _) in list(metrics.items())[:3]:
        note = f"round {rounds[-1]}"
        beside = accuracy_note(told.get("data") or {}, values[-1]) if name == "accuracy" else ""
        note += f", {beside}" if beside else ""
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
    words = [[show(name), show(value)] for name, value in repeated(told)]
    seconds = sum(row.get("seconds") or 0 for row in rows)
    if seconds:
        words.append(
            [
                "time",
                f"{seconds / 60:.1f} minutes for {rows[-1]['round']} rounds, compilation and evaluation not counted",
            ]
        )
    command = f'<pre class="box" tabindex="0"><code>{show(told["command"])}</code></pre>' if told.get("command") else ""
    return command + (table([], words) if words else "")


def _private(config: dict, rows: list[dict]) -> bool:
    """Whether the run has any guarantee."""
    private = config.get("trust") != "none" and (config.get("federation") or {}).get("release") is not None
    return private and (not rows or math.isfinite(as_epsilon(rows[-1].get("epsilon_max"))))


def _page(config: dict, rows: list[dict], said: str, holds: bool, audit: str, cells: list[dict]) -> str:
    """The whole page as HTML; `said` is what the ledger says, and `holds` whether it does."""
    told, private = config.get("federation") or {}, _private(config, rows)
    sent = communication(config, rows, told.get("communication") or {})
    sent += against_rank(config)
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
        ("What an attack found", audit if private else ""),
        ("Many runs", sweep_report.body(cells)),
        ("Clients", clients_table(charged(told.get("clients") or [], rows))),
        ("Communication", sent),
        ("Method", _list(told.get("method") or [])),
        ("How to repeat it", _repeat(rows, told)),
        ("Configuration", f"<details><summary>Every flag ({len(flags)})</summary>{table([], flags)}</details>"),
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


def write(workdir: pathlib.Path, sweep: pathlib.Path | None = None) -> pathlib.Path:
    """Write `workdir/report.html` and `report.md`, each whole or not at all, and return the page's path. Raises InputError for a
    broken workdir, or a `sweep` (finished cells of `experiments.sweep`) that is not there."""
    workdir = pathlib.Path(workdir)
    (config, rows), (said, holds), cells = _read(workdir), _ledger(workdir), _cells(sweep)
    found, words = audits(workdir, config)
    path = workdir / "report.html"
    replace_durably(path, _page(config, rows, said, holds, found, cells))
    text = report_markdown.text(config, rows, _private(config, rows), said, holds, words, cells)
    replace_durably(workdir / "report.md", text)
    return path


def _cells(path: pathlib.Path | None) -> list[dict]:
    """The finished cells of a sweep; none without a `path`. Raises InputError where they are not of one sweep's flags."""
    if path is None:
        return []
    lines = sweep.read(pathlib.Path(path))
    if not lines:
        raise InputError(f"--sweep={path} holds no finished cell: give the file that experiments.sweep wrote (--out).")
    settings = {}
    for line in lines:
        settings.setdefault(sweep_report.place(line), set()).add(line.get("settings"))
    if any(len(found) > 1 for found in settings.values()):
        raise InputError(
            f"--sweep={path} holds cells of several sets of flags under one name, which no table can tell apart: run the sweep "
            "into a file of its own (--out)."
        )
    return lines


@exits.guarded
def main(arguments: list[str]) -> int:
    """Write the report of the one workdir named; 2 and a sentence on stderr if that cannot be."""
    guard.begin(phrase=cli.as_flags)  # the ledger's seals are checked by the secrets
    sweeps = [word.partition("=")[2] for word in arguments if word.startswith("--sweep=")]
    folders = [word for word in arguments if not word.startswith("--sweep=")]
    if len(folders) != 1 or len(sweeps) > 1:
        raise InputError("give one workdir: python -m experiments.report WORKDIR [--sweep=FILE].")
    print(write(pathlib.Path(folders[0]), *map(pathlib.Path, sweeps)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
