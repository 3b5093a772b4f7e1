"""Parts of a report that are tables and figures of their own: the clients, what travelled, and what an audit found."""

import pathlib
import statistics

from dplora_jax.config import FREE_ON_RESUME
from dplora_jax.federation.workdir import with_defaults
from dplora_jax.files import read_json
from experiments.report_figures import SERIES, figure
from experiments.report_text import as_epsilon, show, show_bytes
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
# Flags that an audit may have otherwise than the run.
NOT_AUDITED = {*FREE_ON_RESUME, "seed", "auto", "data_dir", "test_data"}


def table(head: list[str], body: list[list[str]], foot: list[list[str]] = ()) -> str:
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


def charged(clients: list[dict], rows: list[dict]) -> list[dict]:
    """The clients with the epsilon that they have spent by the last round, in place of the one that was planned."""
    spent = (rows[-1].get("epsilon") or []) if rows and rows[-1].get("round") else []
    return (
        [client | {"epsilon": value} for client, value in zip(clients, spent, strict=True)]
        if len(spent) == len(clients)
        else clients
    )


def clients_table(clients: list[dict]) -> str:
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
    return table([CLIENT_COLUMNS[name] for name in names], body, foot) + words


def communication(config: dict, rows: list[dict], sent: dict) -> str:
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
    return table(["what travels", "adapter (this run)", "full fine-tuning"], body)


def against_rank(config: dict) -> str:
    """How many times less a client sends than in full fine-tuning, by rank, for the paper's models: exact, from their shapes."""
    from experiments import communication as shapes

    targets, found = shapes.of_run(config)
    series = {model: [row for row in found if row["model"] == model] for model in shapes.MODELS}

    def draw(axes):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for index, rows in enumerate(series.values()):
            x, y = [row["rank"] for row in rows], [row["ratio"] for row in rows]
            axes.plot(x, y, "o-", color=SERIES[index % len(SERIES)], linewidth=2, markersize=4.2)
        axes.set_xticks(shapes.RANKS, [str(rank) for rank in shapes.RANKS])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}×")
        axes.minorticks_off()

    caption = f"Adapters on {show(', '.join(targets))}, float32, as many times less than all parameters of the model."
    drawn = figure("ranks", "Bytes saved against rank", series, caption, draw, "rank")
    inner = table(*shapes.shown(found, config))
    return f'<div class="figures">{drawn}</div><details><summary>By model and rank</summary>{inner}</details>'


def audits(workdir: pathlib.Path, config: dict) -> tuple[str, str]:
    """What `experiments.audit` found, where its folder lies beside the run's, as HTML and in words, and which of its flags are
    not this run's `config`; else how to run it."""
    path = workdir.with_name(f"{workdir.name}-audit") / "audit.json"
    if not path.exists():
        how = "python -m experiments.audit --flagfile=..."
        note = "attacks the same program and bounds its epsilon from below: none lies beside this run"
        return f'<p class="soft"><code>{how}</code> {note}.</p>', ""
    try:
        found = read_json(path)
        body = [
            [show(line["claim"], "epsilon"), _below(line["guesses"]), _below(line.get("curve")),
             "BROKEN" if line["broken"] else "holds"]
            for line in found["audits"]
        ]  # fmt: skip
        best = [max(line["guesses"], line.get("curve") or 0) for line in found["audits"]]
        words = f"Attacked in {found['runs']} runs: with confidence {found['confidence']:.1%}, the lower bounds are "
        words += (
            ", ".join(f"{_below(low)} (claim {row[0]}: {row[3]})" for low, row in zip(best, body, strict=True)) + "."
        )
        words += _other_flags(found, with_defaults(config))
    except (ValueError, KeyError, TypeError, OSError) as error:
        words = f"The audit beside this run cannot be read ({error})."
        return f"<p><b>{show(words)}</b></p>", words
    head = ["claim", "epsilon is at least (guesses)", "at least (the mechanism’s curve)", "verdict"]
    return f'<p class="soft">{show(words)}</p>{table(head, body)}', words


def _other_flags(found: dict, config: dict) -> str:
    """A sentence on the flags that were audited and are not this run's; nothing where all are."""
    audited = found.get("flags", {})
    if not audited:
        what = "is of a small built-in model, not of this run" if "flags" in found else "does not say of which flags"
        return f" The audit {what}."
    names = [name for name in audited if name in config and name not in NOT_AUDITED and audited[name] != config[name]]
    told = ", ".join(f"{name} {audited[name]} (here {config[name]})" for name in names)
    return f" THE AUDIT IS OF OTHER FLAGS THAN THIS RUN: {told}." if told else ""


def _below(bound) -> str:
    """A lower bound, rounded down."""
    return "—" if bound is None else f"{int(bound * 100) / 100:.2f}"
