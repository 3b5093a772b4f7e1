"""What a report says of a run: one dict of texts, tables and figures, which both templates show."""

import math

from dplora_jax.config import RESULT, deciding
from dplora_jax.federation import trust
from dplora_jax.federation.workdir_files import with_defaults
from dplora_jax.json_files import Unfit, anything, flag, list_of, load, optional, real, record, whole
from experiments import communication
from experiments.report import clients, figures
from experiments.run.summary import sent_uploads
from experiments.text import formats, scores
from experiments.text.tables import Table

MOST_ROUNDS = 12  # evaluated rounds in the table of metrics
# Fields that an audit must have as the run has them.
AUDITED = set(deciding(RESULT)) - {"seed", "auto", "data_dir", "test_data"}
CLAIM = record({"claim": real(0), "guesses": real(0), "broken": flag}, {"curve": optional(real(0))}, anything)
AUDIT = record(
    {"runs": whole(1, 2**31), "confidence": real(0, 1), "audits": list_of(CLAIM)},
    {"flags": optional(record({}, {}))},
    anything,
)


def contents(workdir, stored, rows, agreement, sweep):
    """What the templates show, from a `workdir_files.Stored`, the metrics lines (dicts), the `ledger.Agreement` on them and a
    sweep's tables (`sweep_report.contents`) or None."""
    flags, described, last = stored.config, stored.description, rows[-1] if rows else {}
    private = stored.private and math.isfinite(last.get("epsilon_max", 0.0))
    metrics = figures.by_metric(rows)
    finite = private and bool(rows) and agreement.holds
    return {
        "title": f"{flags.base.name} on {flags.data.dataset}",
        "names": [flags.base.name, flags.data.dataset],
        "description": described["data"]["description"] or "",
        "facts": _facts(stored),
        "tiles": _tiles(stored, rows, metrics, private, agreement.holds),
        "bands": _bands(stored, rows, private, agreement),
        "private": private,
        "started": bool(rows),
        "evaluated": bool(metrics),
        "figures": figures.for_run(flags, rows, private),
        "rounds": _rounds(rows, metrics),
        "kinds": scores.kinds(stored, rows),
        "accuracy_note": formats.accuracy_note(described["data"], metrics["accuracy"][1][-1])
        if "accuracy" in metrics
        else "",
        "trust": described["trust"],
        "epsilon": formats.epsilon(last["epsilon_max"]) if finite else None,
        "delta": formats.number(flags.privacy.delta),
        "tested": _tested(flags.privacy.unit, rows, last) if finite else "",
        "accounting": described["accounting"],
        "ledger": agreement.words,
        "audit": audit(workdir, stored) if private else None,
        "sweep": sweep,
        "clients": clients.table(clients.charged(described["clients"], last), flags.privacy.unit),
        "clients_note": clients.note(described["clients"]),
        "communication": communication_table(stored, rows),
        "ranks": _ranks(stored),
        "method": described["method"],
        "command": described["command"],
        "repeat": Table([], _repeat(rows, described)),
        "flags": Table([], [[k, formats.setting(v)] for k, v in stored.document.items() if k != "federation"]),
    }


def _tested(unit, rows, last):
    """What a record, or a unit, pays where some train and others are kept back; nothing where none are."""
    spent = scores.spent(rows)
    if spent is None:
        return ""
    return (
        f"A {unit} trains or is kept back: training has cost epsilon {formats.epsilon(last['epsilon_max'])}, scores "
        f"{formats.epsilon(spent)}, so no {unit} has paid more than {formats.epsilon(max(spent, last['epsilon_max']))}."
    )


def _facts(stored):
    """The run in a few words each."""
    flags, data = stored.config, stored.description["data"]
    words = [
        f"clients {formats.number(flags.schedule.clients)}",
        f"rounds {formats.number(flags.schedule.rounds)}",
        f"rank {flags.lora.rank}",
    ]
    words += [f"targets {','.join(flags.lora.targets)}", f"trust {flags.privacy.trust}"]
    names = {"train_records": f"train {flags.privacy.unit}s", "test_records": "test records"}
    words += [f"{formats.number(data[name])} {title}" for name, title in names.items() if data[name]]
    kept_back = f"{scores.kept_back(stored)} kept back"
    return words + ([kept_back] if stored.description["private_test"] else [])


def _tiles(stored, rows, metrics, private, confirmed):
    """(label, value, note, whether it is an alarm) of the large figures: the last metrics, epsilon, and what a client sends."""
    flags, tiles = stored.config, []
    for name in _large(metrics):
        rounds, values, _ = metrics[name]
        beside = formats.accuracy_note(stored.description["data"], values[-1]) if name == "accuracy" else ""
        if name in formats.PRIVATE_METRICS:
            row = next(row for row in reversed(rows) if name in row)
            beside = f"{scores.span(row, name)} (95 %), {'noisy' if private else 'EXACT'}"
        begins = "before round 1" if flags.public.trains else "base model"
        base = f"{begins} {formats.metric(values[0])}" if rounds[0] == 0 and len(rounds) > 1 else ""
        note = f"round {rounds[-1]}" + (f", {beside}" if beside else "") + (f"; {base}" if base else "")
        kind = "" if name in formats.PRIVATE_METRICS else "test "
        tiles.append((f"{kind}{formats.metric_name(name)}", formats.metric(values[-1]), note, False))
    if not metrics:
        tiles.append(("test metrics", "—", "no round was evaluated on test data", False))
    if not private:
        tiles.append(("epsilon", "∞", f"no privacy: trust {flags.privacy.trust}", True))
    elif rows:
        note = f"epsilon_max over {formats.number(flags.schedule.clients)} clients, "
        if stored.member is not None:
            note = (
                f"of {clients.who(stored.description['clients'][stored.member], stored.member)}, whose ledger this is, "
            )
        note += f"at delta {formats.number(flags.privacy.delta)}, "
        note += f"after round {rows[-1]['round']} of {formats.number(flags.schedule.rounds)}"
        note += "" if flags.privacy.epsilon is None else f"; budget {formats.epsilon(flags.privacy.epsilon)}"
        note += "" if confirmed else "; NOT CONFIRMED by the ledger"
        tiles.append(("epsilon", formats.epsilon(rows[-1]["epsilon_max"]), note, not confirmed))
    sent = stored.description["communication"]
    if sent["ratio"]:
        up, full = (formats.size(sent[f"{name}_per_client_per_round"]) for name in ("bytes_up", "full_bytes"))
        ratio = float(f"{sent['ratio']:.3g}")
        note = f"{up} per client and round instead of {full} for full fine-tuning"
        tiles.append(("bytes sent", f"{ratio:,.5g}× less", note, False))
    return tiles


def _large(metrics):
    """The names of the metrics that are shown large: three of the public test set, two of private records."""
    private = [name for name in metrics if name in formats.PRIVATE_METRICS]
    return [*[name for name in metrics if name not in private][:3], *private[:2]]


def _bands(stored, rows, private, agreement):
    """(kind, what, why) of what a reader must know before a figure is believed: no privacy, not for release, unfinished."""
    flags, bands = stored.config, []
    if not agreement.holds:
        bands.append(("bad", "Do not rely on these figures.", agreement.words))
    if not private:
        why = "Its uploads and its adapter may reveal any record."
        bands.append(("bad", "There is no privacy in this run.", why))
    elif stored.release != "for release":
        bands.append(("care", stored.release, ""))
    if (notice := trust.mode(flags).notice) and not stored.description["apart"]:
        bands.append(("info", *notice))
    if stored.description["data"]["synthetic"]:
        bands.append(("info", "Synthetic data.", "The metrics show that the program works, not how well a model does."))
    done = rows[-1]["round"] if rows else 0
    if done < flags.schedule.rounds:
        bands.append(("info", f"{done} of {flags.schedule.rounds} rounds.", "The run has not reached its last round."))
    return bands


def _rounds(rows, metrics):
    """The evaluated rounds, or some of them, with their epsilon and metrics; None where none was evaluated."""
    rounds = sorted({number for numbers, _, _ in metrics.values() for number in numbers})
    if not rounds:
        return None
    step = max(1, math.ceil((len(rounds) - 1) / (MOST_ROUNDS - 1)))
    by_round = {row["round"]: row for row in rows}
    spent, body = {number: formats.epsilon(row["epsilon_max"]) for number, row in by_round.items()}, []
    for number in sorted({*rounds[::step], rounds[-1]}):
        row = by_round[number]
        values = [dict(zip(numbers, column, strict=True)).get(number) for numbers, column, _ in metrics.values()]
        cells = ["" if v is None else _score(row, name, v) for name, v in zip(metrics, values, strict=True)]
        body.append([str(number), spent[number], *cells])
    return Table(["round", "epsilon", *map(formats.metric_name, metrics)], body)


def _score(row, name, value):
    """A metric's value in a metrics line, with its interval where it has one."""
    interval = scores.span(row, name)
    return formats.metric(value) + (f" ({interval})" if interval else "")


def communication_table(stored, rows):
    """What travels, beside what full fine-tuning would send."""
    sent, times = stored.description["communication"], rows[-1]["round"] if rows else 0
    up, down, full = (sent[f"{name}_per_client_per_round"] for name in ("bytes_up", "bytes_down", "full_bytes"))
    uploads = sent_uploads(rows, stored.config.schedule.clients)
    total = [formats.size(None if count is None else count * uploads) for count in (up, full)]
    parameters = [formats.number(sent[name]) for name in ("adapter_parameters", "full_parameters")]
    body = [
        ["parameters trained and sent", *parameters],
        ["bytes up, per client and round", formats.size(up), formats.size(full)],
        ["bytes down, per client and round", formats.size(down), formats.size(full)],
        [f"bytes up, {uploads:,} uploads in {times} rounds", *total],
    ]
    return Table(["what travels", "adapter (this run)", "full fine-tuning"], body)


def _ranks(stored):
    """How many times less a client sends, by rank, for the paper's models: exact, from their shapes."""
    targets, rows = communication.run_rows(stored.config)
    figure = figures.against_rank(rows, communication.MODELS, communication.RANKS, targets)
    return {"figure": figure, "targets": targets, "table": communication.by_rank(rows, stored.config)}


def audit(workdir, stored):
    """What `experiments.audit` reached, where its folder lies beside the run's, as {"words", "table"}: the words say which of its
    flags are not this run's. No words where there is none."""
    try:
        result = load(workdir.with_name(f"{workdir.name}-audit") / "audit.json", AUDIT)
    except FileNotFoundError:
        return {"words": "", "table": None}
    except (Unfit, OSError) as error:
        return {"words": f"The audit beside this run cannot be read ({error}).", "table": None}
    body, best = [], []
    for line in result["audits"]:
        claim, verdict = formats.epsilon(line["claim"]), "BROKEN" if line["broken"] else "holds"
        guesses, curve = line["guesses"], line.get("curve")
        body.append([claim, formats.lower_bound(guesses), formats.lower_bound(curve), verdict])
        best.append(f"{formats.lower_bound(max(guesses, curve or 0))} (claim {claim}: {verdict})")
    words = f"Attacked in {result['runs']} runs: with confidence {result['confidence']:.1%}, the lower bounds are "
    words += f"{', '.join(best)}.{_other_flags(result, with_defaults(stored.document))}"
    head = ["claim", "epsilon is at least (guesses)", "at least (the mechanism’s curve)", "verdict"]
    return {"words": words, "table": Table(head, body)}


def _other_flags(result, document):
    """A sentence on the flags that were audited and are not this run's; nothing where all are."""
    audited = result.get("flags")
    if not audited:
        what = (
            "attacked a small built-in model, not this run"
            if "flags" in result
            else "does not say which flags it ran with"
        )
        return f" The audit {what}."
    names = [k for k in audited if k in document and k in AUDITED and audited[k] != document[k]]
    words = ", ".join(f"{name} {audited[name]} (here {document[name]})" for name in names)
    return f" THE AUDIT RAN WITH OTHER FLAGS THAN THIS RUN: {words}." if words else ""


def _repeat(rows, described):
    """(name, value) of what another party compares to repeat the run: where it ran, the base's files, and how long it took."""
    words = [[name, formats.number(value)] for name, value in described["environment"].items()]
    words += [[f"SHA-256 of the base's {name}", digest] for name, digest in described["base_files"].items()]
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    if seconds:
        spent = f"{seconds / 60:.1f} minutes for {rows[-1]['round']} rounds, compilation and evaluation not counted"
        words.append(["time", spent])
    return words
