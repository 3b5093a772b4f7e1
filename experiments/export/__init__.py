"""Write an adapter as others serve it: merged into its base, for PEFT, or as a GGUF file, each with a model card.

    python -m experiments.export --workdir=runs/finance --out=exported
    python -m experiments.export --model=SmolLM2-135M-Instruct --adapter=my_adapter --out=exported
    python -m experiments.export --workdir=runs/general --format=gguf --out=exported --push_to_hub=me/my-adapter

Exit codes are 0 done, 2 bad input, 74 a file cannot be written. The card carries the run's word on whether it may be released.
"""

import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

from absl import flags

from dplora_jax import errors, files, guard
from dplora_jax.errors import InputError
from dplora_jax.federation import workdir_files
from experiments import cli, ledger
from experiments.cli import exits
from experiments.export import adapters, merged

DTYPES = ("float32", "bfloat16", "float16")
FORMATS = {"merged": merged.write, "peft": adapters.write_peft, "gguf": adapters.write_gguf}
# Of an earlier export, what would be read along with the new one.
STALE = (
    "model*.safetensors", "model.safetensors.index.json", "tokenizer*", "vocab.*", "chat_template*", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "generation_config.json", "modules.json", "1_Pooling/*", "*_Dense/*",
    "sentence_bert_config.json", "config_sentence_transformers.json", "adapter_config.json", "adapter_model.safetensors",
    "config.json", adapters.GGUF_FILE,
)  # fmt: skip
UNTOLD = "unknown: nothing beside the adapter tells how it was trained"


class Run(NamedTuple):
    """The run that trained an adapter: its config.json, the last line of its metrics, whether its ledger confirms both, and
    whether it has ended."""

    stored: workdir_files.Stored
    last: dict
    ledger: ledger.Agreement
    ended: bool = False


class Job(NamedTuple):
    """One export: where the base, the adapter and the result lie, the run that trained it (None where it is not known), what
    writes it (`write(job, loaded, draft) -> (README.md, closing line)`), and the hub's repository to upload it to."""

    model: str
    adapter: pathlib.Path
    out: pathlib.Path
    dtype: str
    labels: tuple | None
    run: Run | None
    release: str
    shard_bytes: int
    write: Callable
    push: str | None


@exits.guarded
def main(argv=None):
    """Export as the command line `argv` (default: this process's) says -> exit code."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # one pass over the weights: no accelerator's memory need hold them
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    guard.begin(phrase=cli.as_flags)  # the ledger's seals are checked by the secrets
    export(parse(sys.argv[1:] if argv is None else argv))
    return 0


def parse(argv):
    """The command line (without the program's name) -> Job; InputError with one sentence on anything wrong."""
    values = flags.FlagValues()
    text = {
        "workdir": "a finished run's workdir: its base model, adapter, labels and release mark",
        "model": "the base: directory, .gguf file, installed package or hub id; with --workdir, where it lies now",
        "adapter": "in place of --workdir: a directory with an adapter in PEFT's format",
        "out": "directory to write",
        "push_to_hub": "repository of the Hugging Face hub (NAME/REPO) to upload the written files to, and no others; only of a "
        "finished run whose ledger confirms it and that is for release; a new one is private",
        "labels": "comma-separated names of a classifier's labels, in order; default: the run's, or the base's",
        "dtype": "float32, bfloat16 or float16; default: the run's (of a mixed one float32), else float32",
    }
    for name, help_text in text.items():
        flags.DEFINE_string(name, None, help_text, flag_values=values)
    flags.DEFINE_enum(
        "format",
        "merged",
        list(FORMATS),
        "merged: the adapter in its base, a checkpoint for transformers; peft: the adapter alone, for PEFT; gguf: the adapter "
        "alone, for llama.cpp and Ollama",
        flag_values=values,
    )
    flags.DEFINE_boolean("overwrite", False, "replace the files of an earlier export in --out", flag_values=values)
    flags.DEFINE_integer("max_shard_bytes", 5 * 10**9, "bytes of one weights file, at most", 1, flag_values=values)
    cli.read_alone(argv, values, "export", __doc__)
    return _job(values)


def _job(given):
    if (given.workdir is None) == (given.adapter is None) or (given.adapter and given.model is None):
        raise InputError("give --workdir of a finished run, or --model and --adapter.")
    if given.out is None:
        raise InputError("--out is missing: the directory to write.")
    folder, run = given.workdir and pathlib.Path(given.workdir), None
    adapter = folder / "adapter" if folder else pathlib.Path(given.adapter)
    if folder:
        run = _run(folder)
        if not adapter.is_dir():
            raise InputError(
                f"{folder} has no adapter yet: finish the run with its own command, which goes on where it was."
            )
    labels = given.labels and tuple(name.strip() for name in given.labels.split(","))
    labels = labels or (run and tuple(map(str, run.stored.description["data"]["labels"]))) or _noted_labels(adapter)
    if labels and len(set(labels)) < len(labels):
        raise InputError(f"the labels {', '.join(labels)} are not all different.")
    own = run.stored.config.base.dtype if run else "float32"
    own = "float32" if own == "mixed" else own  # such a run rounds its own copy of the weights alone
    dtype = given.dtype or own
    if dtype not in DTYPES:
        raise InputError(f"--dtype={dtype} is not known: {', '.join(DTYPES)}.")
    out = pathlib.Path(given.out)
    _check_out(out, given.overwrite)
    if out.resolve() in {path.resolve() for path in (adapter, folder or adapter)}:
        raise InputError(f"--out={out} is the run's own directory: choose another.")
    model = given.model or run.stored.config.base.name
    return Job(
        model, adapter, out, dtype, labels, run, _release(run, adapter), given.max_shard_bytes, FORMATS[given.format],
        given.push_to_hub,
    )  # fmt: skip


def _check_out(out, overwrite):
    """Refuse an --out that would mix with what is there, or destroy what no export wrote."""
    from experiments.run import model_card

    try:
        full = out.exists() and (not out.is_dir() or any(out.iterdir()))
        card = out / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if full and card.is_file() else ""
        earlier = any(title in text for title in model_card.TITLES)
    except OSError as error:
        raise InputError(f"--out={out} cannot be read ({error.strerror}).") from None
    if full and not earlier:
        raise InputError(f"--out={out} holds files that no export wrote: choose an empty directory.")
    if full and not overwrite:
        raise InputError(f"--out={out} holds an export already: choose another directory, or give --overwrite.")


def _run(folder):
    """The Run of a workdir."""
    for name in ("config.json", "metrics.jsonl"):
        if files.find(folder, name) is None:
            raise InputError(f"{folder} is not a run's workdir: it has no {name}.")
    stored, lines = workdir_files.read_config(folder), workdir_files.read_metrics(folder)
    last, agreement = lines[-1].values if lines else {}, ledger.agreement(folder)
    ended = agreement.holds and _ended(folder, last.get("round") == stored.config.schedule.rounds)
    return Run(stored, last, agreement, ended)


def _ended(folder, last_round):
    """Whether a run came to its end: by its ledger, and without one of its own (a coordinator's) by its `last_round`."""
    path = folder / ledger.FILE
    return ledger.Ledger(path, mend=False).ended if path.exists() else last_round


def _release(run, adapter):
    """Whether the export may be released: what the run says where its ledger confirms it, or the note that the run wrote beside
    its adapter."""
    if run is not None:
        if not run.stored.private:
            return f"{workdir_files.NO_PRIVACY}: the run was made without it"
        return run.stored.release if run.ledger.holds else f"NOT FOR RELEASE. {run.ledger.words.rstrip('.')}"
    note = files.find(adapter, "README.md")
    note_text = files.read_bytes(note).decode("utf-8", "replace") if note else ""
    marks = {"NOT FOR RELEASE": " (--seed made its noise reproducible)", "NO PRIVACY": ""}
    return next((f"{mark}{why}" for mark, why in marks.items() if mark in note_text), UNTOLD)


def _noted_labels(adapter):
    """The labels that a run noted beside its adapter, in the order of the head's outputs; None where it noted none."""
    from experiments.run import model_card

    note = files.find(adapter, "README.md")
    lines = files.read_bytes(note).decode("utf-8", "replace").splitlines() if note else ()
    label_line = next(
        (line.removeprefix(model_card.LABELS) for line in lines if line.startswith(model_card.LABELS)), "[]"
    )
    named = files.parse_json(label_line.encode(), adapter / "README.md", list)
    return tuple(map(str, named)) or None


def export(job):
    """Write beside --out, and put in its place; then upload, if asked; print what was done. Raises InputError."""
    from experiments.export import hub, loading

    if job.push:
        hub.check(job.push, job.run, job.release)
    loaded = loading.load(job)
    try:
        job.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{job.out.name}.", dir=job.out.parent) as draft:
            draft = pathlib.Path(draft)
            card, closing_line = job.write(job, loaded, draft)
            (draft / "README.md").write_text(card, encoding="utf-8")
            names = _move(draft, job.out)
    except OSError as error:
        raise errors.storage(error) or InputError(
            f"--out={job.out} cannot be written ({error.strerror or error})."
        ) from None
    print(closing_line)
    if job.push:
        print(hub.push(job.push, job.out, names))


def _move(draft, out):
    """Put the files of `draft` into `out`, in place of an earlier export's -> their names; what else lies there stays."""
    out.mkdir(exist_ok=True)
    for pattern in STALE:
        for path in out.glob(pattern):
            path.unlink()
    for folder in filter(pathlib.Path.is_dir, out.glob("*_*")):  # of a sentence model's modules
        if not any(folder.iterdir()):
            folder.rmdir()
    names = [path.relative_to(draft) for path in sorted(draft.rglob("*")) if path.is_file()]
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.move(draft / name, out / name)
    return names
