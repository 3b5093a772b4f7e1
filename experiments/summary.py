"""The line that a run ends with."""

import json

from experiments.report_text import METRICS

HIDDEN = {
    "local": "every client's records",
    "distributed": "every client's records (secure aggregation simulated)",
    "client": "every client as a whole",
}


def line(folder):
    """The line to end with, from the run's own files."""
    config = json.loads((folder / "config.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    facts, sent = config["federation"], config["federation"]["communication"]
    found = [f"{label} {float(last[name]):.3f}" for name, label in METRICS.items() if name in last]
    metrics = f"test {', '.join(found)}" if found else "not evaluated"
    budget = (
        "NO PRIVACY"
        if config["trust"] == "none"
        else f"epsilon {last['epsilon_max']:.3f} at delta {config['delta']:g} for {HIDDEN[config['trust']]}"
    )
    rounds, uploads = last["round"], sent_uploads(lines, config["clients"]) / config["clients"]
    kind = " (synthetic data)" if facts["data"]["synthetic"] else ""
    seeded = " NOT FOR RELEASE (--seed)." if config["seed"] is not None and config["trust"] != "none" else ""
    return (
        f"{config['dataset']}{kind}, {config['clients']} clients, {rounds} rounds: {metrics}; {budget}; "
        f"{_bytes(uploads * sent['bytes_up_per_client_per_round'])} sent by each client instead of "
        f"{_bytes(uploads * sent['full_bytes_per_client_per_round'])} for full fine-tuning ({sent['ratio']:,.0f}x less). "
        f"Adapter: {folder / 'adapter'}  Report: {folder / 'report.html'}{seeded}"
    )


def sent_uploads(lines, clients):
    """How many uploads the metrics `lines` (dicts) tell of: each of `clients` clients' in each round, where they say no other."""
    return sum(
        line["finished"] + len(line["dropped"]) if "finished" in line else clients for line in lines if line["round"]
    )


def _bytes(number):
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"
