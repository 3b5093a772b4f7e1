"""The line that a run ends with."""

from dplora_jax.errors import InputError
from dplora_jax.federation import trust, workdir_files
from experiments import ledger
from experiments.text import formats, scores


def line(folder):
    """The line to end with, from the run's own files; where the ledger does not confirm them, it says that first."""
    stored, lines = workdir_files.read_config(folder), workdir_files.read_metrics(folder)
    if not lines:
        raise InputError(f"{folder}/metrics.jsonl does not exist or is empty: restore it.")
    last, flags, sent = lines[-1].values, stored.config, stored.description["communication"]
    metrics, kept_back = scores.of_line(stored, last), scores.spent([line.values for line in lines])
    confirmed = ledger.agreement(folder)
    budget = (
        f"epsilon {formats.epsilon(last['epsilon_max'])} at delta {flags.privacy.delta:g} for {trust.mode(flags).protects(flags)}"
        if stored.private
        else workdir_files.NO_PRIVACY
    )
    if kept_back is not None and stored.private:
        budget += f" that train, and {formats.epsilon(kept_back)} for those that are kept back"
    each = sent_uploads([line.values for line in lines], flags.schedule.clients) / flags.schedule.clients
    up, full = (each * sent[f"{name}_per_client_per_round"] for name in ("bytes_up", "full_bytes"))
    kind = " (synthetic data)" if stored.description["data"]["synthetic"] else ""
    seeded = " NOT FOR RELEASE (--seed)." if flags.privacy.seed is not None and stored.private else ""
    doubt = "" if confirmed.holds else f"DO NOT RELY ON THESE FIGURES. {confirmed.words} "
    return (
        f"{doubt}{flags.data.dataset}{kind}, {flags.schedule.clients} clients, {last['round']} rounds: {metrics}; {budget}; "
        f"{formats.size(up)} sent by each client instead of {formats.size(full)} for full fine-tuning "
        f"({sent['ratio']:,.0f}x less). Adapter: {folder / 'adapter'}  Report: {folder / 'report.html'}{seeded}"
    )


def sent_uploads(lines, clients):
    """How many uploads the metrics `lines` (dicts) count: each of `clients` clients' in each round, where they say no other."""
    return sum(
        line["finished"] + len(line["dropped"]) if "finished" in line else clients for line in lines if line["round"]
    )
