"""What an export says of itself: its README.md, and the line that the command ends with."""

import pathlib

from dplora_jax.federation import methods
from dplora_jax.files import to_json
from dplora_jax.models import hf_checkpoint
from dplora_jax.models.pretrained import hub_id
from experiments.run import card_header
from experiments.text import formats, scores
from experiments.text.tables import Table

# Of every README.md that an export writes: by them the next one knows its folder.
MERGED, ADAPTER = TITLES = ("with a merged LoRA adapter", "# LoRA adapter for ")
LABELS = "Labels, in the order of the head's outputs: "  # of an adapter's README.md, before a JSON list
AVERAGED = (
    "This classifier averages the tokens of a text, and transformers' own classifier reads the first "
    "token alone, so that it would give other logits: this is a sentence-transformers directory, whose `encode` gives the logits."
)
OWN_MODELS = "The figures are means over the clients' own models"  # of FedSA-LoRA
AUTO_CLASSES = {
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
}


def _reader(model, document):
    """(class, task) that the export is read with; no class for ChatGLM, which transformers does not have."""
    if hf_checkpoint.averages(model):
        return "SentenceTransformer", "text-classification"
    name = document["architectures"][0]
    return next((classes for end, classes in AUTO_CLASSES.items() if name.endswith(end)), (None, "text-generation"))


def adapter_note(model, line, labels=(), reading=""):
    """README.md of a run's own adapter files: what the run ends with, its labels, and what reads them as they are meant;
    `reading` is how a language model's labels are read."""
    said = f"\nRead as {formats.markdown(reading)}.\n" if reading else ""
    return f"# LoRA adapter\n\n{line}\n{_remarks(model, labels)}{said}"


def _remarks(model, labels):
    """What an adapter's files have no place for: a classifier's labels, and how it pools."""
    note = ""
    if labels and model.config.num_labels is not None:  # PEFT's files have no place for them; an export reads this line
        note += f"\n{LABELS}{to_json(list(labels), ensure_ascii=False)}\n"
    if hf_checkpoint.averages(model):
        note += (
            "\nTo PEFT the base is another classifier: this one averages the tokens of a text, and "
            "transformers' own reads the first token alone. `python -m experiments.export "
            "--workdir=...` writes a sentence-transformers directory whose `encode` gives these logits.\n"
        )
    return note


def adapter_notes(config, model, line, labels=(), reading=""):
    """(folder below adapter/, its README.md) of a run's files: one, and where every client keeps its own B (FedSA-LoRA), one a
    client."""
    note = adapter_note(model, line, labels, reading)
    if not methods.BY_NAME[config.aggregation.method].personal:
        return [(".", note)]
    shared = f"{note}\nThis is the shared A with the mean of the clients' B. {OWN_MODELS}, which lie in `clients/`.\n"
    client_notes = [
        f"{note}\nThis is client {k}'s own model: the shared A with its B. {OWN_MODELS}.\n"
        for k in range(config.schedule.clients)
    ]
    return [(".", shared), *((f"clients/{k}", text) for k, text in enumerate(client_notes))]


def closing_line(job, model, document):
    """What was written and how it is read, on a line; before it, for a mean-pooled classifier, why it is what it is."""
    reader, _ = _reader(model, document)
    call = (
        f"{reader}({str(job.out)!r})"
        if reader == "SentenceTransformer"
        else f"{reader}.from_pretrained({str(job.out)!r})"
    )
    how = call if reader else "the model's own published code, which transformers lacks,"
    line = f"Wrote the merged model to {job.out}: {how} reads it. Release: {job.release}."
    return f"{AVERAGED}\n{line}" if reader == "SentenceTransformer" else line


def text(job, model, document, config, labels):
    """README.md: the base, the method, each client's budget, the labels and the release mark."""
    averaged = hf_checkpoint.averages(model)
    library = "sentence-transformers" if averaged else "transformers"
    parts = [_header(job, model, document, library), f"# {_base_name(job)} {MERGED}"]
    parts += [_release(job), _use(averaged, labels)] if labels else [_release(job)]
    return "\n\n".join([*parts, *_training(job, config)]) + "\n"


def adapter_text(job, model, document, config, labels, library, use):
    """README.md of an adapter alone, which `library` (the hub's name of it) reads; `use` is how, in Markdown."""
    parts = [_header(job, model, document, library), f"{ADAPTER}{_base_name(job)}", _release(job), use]
    remarks = _remarks(model, labels or ()).strip()
    return "\n\n".join([*parts, *([remarks] if remarks else []), *_training(job, config)]) + "\n"


def _header(job, model, document, library):
    return card_header.text(job, library, _reader(model, document)[1], hub_id(job.model))


def _base_name(job):
    return formats.markdown(hub_id(job.model) or pathlib.Path(job.model).name)


def _release(job):
    return f"**Release: {formats.markdown(job.release)}.** The license is for the person who publishes it to state."


def _training(job, config):
    """The sections on how it was trained and what that guarantees."""
    method = job.run.stored.description["method"] if job.run else []
    matrices = f"LoRA of rank {config.rank}, alpha {config.alpha:g}, on {', '.join(config.targets) or 'no matrix (a head alone)'}"
    yield "## Training\n\n" + "\n".join(f"- {formats.markdown(line)}" for line in method or [matrices])
    if job.run:
        yield from _run_facts(job.run)


def _use(averaged, labels):
    lines = [f"Labels, in the order of the logits: {formats.markdown(', '.join(labels))}."]
    if averaged:
        lines += [AVERAGED, "```python\nfrom sentence_transformers import SentenceTransformer"]
        lines[-1] += (
            '\n\nlogits = SentenceTransformer("path/to/this").encode(["a text"], normalize_embeddings=False)\n```'
        )
    return "\n\n".join(lines)


def _guarantee(run):
    """The guarantee in five lines, and where its full statement is."""
    said = card_header.privacy(run)
    budget = f"{formats.epsilon(run.last['epsilon_max'])} at delta {said['delta']:g}, the largest of any client's"
    rows = {"Epsilon": budget, "Unit": said["unit"], "Neighbours": said["neighbours"], "Trust mode": said["trust"]}
    if "epsilon_of_scores" in said:
        rows["Epsilon of records that are kept back, for scores"] = said["epsilon_of_scores"]
    lines = [f"- **{name}:** {formats.markdown(value)}" for name, value in rows.items()]
    where = "The full statement is below, in the run's report.md, and with its proof in the PRIVACY.md of dplora_jax."
    return "\n".join(["## Privacy\n", *lines, "", where])


def _run_facts(run):
    """The federation's data, guarantee and metrics, all of it public; no guarantee that the ledger does not confirm."""
    flags, described, last = run.stored.config, run.stored.description, run.last
    data = formats.markdown(described["data"]["description"] or flags.data.dataset)
    yield f"Data: {data} Texts were cut to {flags.data.max_length} tokens."
    if not run.ledger.holds:
        yield f"**Do not rely on these figures.** {formats.markdown(run.ledger.words)}"
    elif run.stored.private and last:
        yield _guarantee(run)
    if run.ledger.holds and described["trust"]:
        yield "\n".join(f"- {formats.markdown(line)}" for line in described["trust"])
    if run.stored.private and run.ledger.holds and last:
        rows = [
            [str(k), formats.number(records), formats.epsilon(spent)]
            for k, (records, spent) in enumerate(zip(run.stored.records, last["epsilon"], strict=True))
        ]
        yield Table(["client", f"{flags.privacy.unit}s", f"epsilon at delta {flags.privacy.delta:g}"], rows).markdown()
    public, private = scores.public(last), scores.private(last)
    if public:
        whose = f" {OWN_MODELS}, not of this one." if methods.BY_NAME[flags.aggregation.method].personal else ""
        yield f"On the public test set: {', '.join(public)}.{whose}"
    if private:
        kind = "noisy counts" if run.stored.private else "EXACT counts, without privacy,"
        on = f"{scores.kept_back(run.stored)} {flags.privacy.unit}s that never train"
        yield f"By {kind} on {on}: {', '.join(private)}, 95 % intervals."
