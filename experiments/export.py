"""Merge an adapter into its base and write the checkpoint that transformers (of a mean-pooled classifier:
sentence-transformers) reads.

    python -m experiments.export --workdir=runs/finance --out=exported
    python -m experiments.export --model=SmolLM2-135M-Instruct --adapter=my_adapter --out=exported

Exit codes are 0 done, 2 bad input,
74 a file cannot be written. The checkpoint carries the run's word on whether it may be released.
"""

import os
import pathlib
import re
import shutil
import sys
import tempfile
import warnings
from typing import NamedTuple

from absl import flags

from dplora_jax import errors, files, guard
from dplora_jax.errors import InputError
from dplora_jax.federation import workdir_files
from experiments import cli, ledger
from experiments.cli import exits

DTYPES = ("float32", "bfloat16", "float16")
# Of an earlier export, what would be read along with the new one.
STALE = (
    "model*.safetensors", "model.safetensors.index.json", "tokenizer*", "vocab.*", "chat_template*", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "generation_config.json", "modules.json", "1_Pooling/*", "*_Dense/*",
    "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
UNTOLD = "unknown: nothing beside the adapter tells how it was trained"


class Run(NamedTuple):
    """The run that trained an adapter: its config.json, the last line of its metrics, and whether its ledger confirms both."""

    stored: workdir_files.Stored
    last: dict
    ledger: ledger.Agreement


class Job(NamedTuple):
    """One export: where the base, the adapter and the result lie, and the run that trained it (None where it is not known)."""

    model: str
    adapter: pathlib.Path
    out: pathlib.Path
    dtype: str
    labels: tuple | None
    run: Run | None
    release: str
    shard_bytes: int


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
        "labels": "comma-separated names of a classifier's labels, in order; default: the run's, or the base's",
        "dtype": "float32, bfloat16 or float16; default: the run's, else float32",
    }
    for name, help_text in text.items():
        flags.DEFINE_string(name, None, help_text, flag_values=values)
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
    dtype = given.dtype or (run.stored.config.base.dtype if run else "float32")
    if dtype not in DTYPES:
        raise InputError(f"--dtype={dtype} is not known: {', '.join(DTYPES)}.")
    out = pathlib.Path(given.out)
    _check_out(out, given.overwrite)
    if out.resolve() in {path.resolve() for path in (adapter, folder or adapter)}:
        raise InputError(f"--out={out} is the run's own directory: choose another.")
    model = given.model or run.stored.config.base.name
    return Job(model, adapter, out, dtype, labels, run, _release(run, adapter), given.max_shard_bytes)


def _check_out(out, overwrite):
    """Refuse an --out that would mix with what is there, or destroy what no export wrote."""
    from experiments.run import model_card

    try:
        full = out.exists() and (not out.is_dir() or any(out.iterdir()))
        card = out / "README.md"
        earlier = full and card.is_file() and model_card.TITLE in card.read_text(encoding="utf-8", errors="replace")
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
    return Run(stored, lines[-1].values if lines else {}, ledger.agreement(folder))


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
    """Merge, write beside --out, and put in its place; print what was written. Raises InputError."""
    from dplora_jax import lora, peft
    from dplora_jax.models import encoder, hf_checkpoint, pretrained
    from experiments.run import model_card

    place = pretrained.locate(job.model)
    if job.out.resolve() == place.resolve():
        raise InputError(f"--out={job.out} is the base model's own directory: choose another.")
    hf = pretrained.config(place)
    if job.run and job.run.stored.config.base.quantize:
        kind = job.run.stored.config.base.quantize
        print(f"The run froze its base in {kind}; the adapter is merged into the base as it is, not rounded.")
    model, params = _base(place, job)
    labels = _labels(job, model, hf)
    adapter, config = peft.load(job.adapter, model, params)
    params, model = lora.merge(model, params, adapter, config), encoder.reading(model, adapter)
    tokenizer = _tokenizer(place, model, hf)
    pad = tokenizer.pad_token_id if tokenizer else hf.get("pad_token_id")
    document = hf_checkpoint.config(model, hf, labels, pad)
    try:
        job.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{job.out.name}.", dir=job.out.parent) as draft:
            draft = pathlib.Path(draft)
            hf_checkpoint.copy_side_files(place, draft, tokenizer, "auto_map" in hf)
            hf_checkpoint.save(draft, model, params, document, place, job.shard_bytes)
            if hf_checkpoint.averages(model):
                length = job.run and job.run.stored.config.data.max_length
                hf_checkpoint.save_modules(draft, model, params, labels, place, length)
            (draft / "README.md").write_text(model_card.text(job, model, document, config, labels), encoding="utf-8")
            _move(draft, job.out)
    except OSError as error:
        raise errors.storage(error) or InputError(
            f"--out={job.out} cannot be written ({error.strerror or error})."
        ) from None
    print(model_card.closing_line(job, model, document))


def _base(place, job):
    """The base (model, params); where the adapter has a head, a classifier of as many labels, whose own head does not matter."""
    from dplora_jax import models

    count = _head_rows(job.adapter)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the head starts fresh")
        return models.from_pretrained(place, job.dtype, label_names=None if count is None else range(count))


def _head_rows(adapter):
    """How many labels the classification head in an adapter's file has; None where it has no head."""
    import safetensors

    path = files.find(adapter, "adapter_model.safetensors")
    if path is None:
        raise InputError(f"{adapter} holds no readable PEFT adapter (it has no adapter_model.safetensors).")
    try:
        with safetensors.safe_open(path, "np") as file:
            pattern = r"\.(classifier|classifier\.out_proj|score)\.weight$"
            heads = [name for name in file.keys() if re.search(pattern, name)]  # noqa: SIM118
            shape = file.get_slice(heads[0]).get_shape() if heads else None
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{adapter} holds no readable PEFT adapter ({error}).") from None
    if shape is not None and (len(shape) != 2 or 0 in shape):  # an empty one may claim any number of rows
        raise InputError(f"{adapter}: tensor {heads[0]} has shape {tuple(shape)}, which is not a classifier's head.")
    return shape[0] if heads else None


def _tokenizer(place, model, hf):
    """The tokenizer where the export needs more of it than its files: a GGUF file's, and a decoder's classifier's pad token."""
    from dplora_jax import models
    from dplora_jax.models import registry

    if not place.is_file() and (model.config.num_labels is None or registry.bidirectional(hf["model_type"])):
        return None
    try:
        return models.load_tokenizer(place)
    except InputError:
        if place.is_file() or hf.get("pad_token_id") is None:
            raise
        return None


def _labels(job, model, hf):
    """A classifier's label names: as given, else as the base names them, else by number; None of a language model."""
    count, named = model.config.num_labels, hf.get("id2label") or {}
    if count is None:
        if job.labels and job.run is None:
            raise InputError(
                f"--labels names a classifier's labels, and {job.adapter} with this base is a language model."
            )
        return None
    if job.labels is None and named.keys() == {str(i) for i in range(count)}:
        return tuple(str(named[str(i)]) for i in range(count))
    labels = job.labels or tuple(f"LABEL_{i}" for i in range(count))
    if len(labels) != count:
        raise InputError(f"{job.adapter} is a classifier of {count} labels, and {len(labels)} are named.")
    return labels


def _move(draft, out):
    """Put the files of `draft` into `out`, in place of an earlier export's; what else lies there stays."""
    out.mkdir(exist_ok=True)
    for pattern in STALE:
        for path in out.glob(pattern):
            path.unlink()
    for folder in filter(pathlib.Path.is_dir, out.glob("*_*")):  # of a sentence model's modules
        if not any(folder.iterdir()):
            folder.rmdir()
    for path in sorted(draft.rglob("*")):
        if path.is_file():
            target = out / path.relative_to(draft)
            target.parent.mkdir(exist_ok=True)
            shutil.move(path, target)


if __name__ == "__main__":
    sys.exit(main())
