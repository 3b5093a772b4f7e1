"""A small run with every moving part, for the tests that start, kill and look at one."""

import collections
import json
import pathlib

import safetensors.numpy

from dplora_jax.federation import storage
from dplora_jax.finetuning import setup
from experiments import cli


def arguments(tiny_bert, finance_table, tmp_path):
    """The flags of a small run with every moving part, and a workdir of its own."""
    return [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=3", "--rounds=6", "--local_steps=2", "--expected_batch_size=8", "--rank=2",
        "--epsilon=8", "--delta=1e-3", "--client_lr=0.1", "--head_lr=1", "--server_momentum=0.5", "--ema=0.5",
        "--eval_every=2", f"--workdir={tmp_path / 'run'}",
    ]  # fmt: skip


def fit(arguments, **options):
    """The federation of a command line, fitted to its end without the command around it -> its FineTuning."""
    config = cli.parse(arguments, lambda _: None)
    with storage.open_workdir(config.output.workdir, config) as workdir:
        job = setup.prepare(config, workdir.stored)
        collections.deque(job.fit(workdir, **options), maxlen=0)
    return job


def adapter_of(workdir):
    return safetensors.numpy.load_file(pathlib.Path(workdir) / "adapter" / "adapter_model.safetensors")


def lines_of(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def strict_json_files(folder):
    """The names of the files below `folder` that hold JSON; ValueError where a strict parser would fail."""

    def refuse(word):
        raise ValueError(f"{path} holds {word}")

    names = []
    for path in sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file()):
        content = path.read_bytes()
        if not content.startswith((b"{", b"[")):
            continue
        pieces = content.splitlines() if path.suffix == ".jsonl" else [content]
        for piece in pieces:
            json.loads(piece, parse_constant=refuse)
        names.append(path.name)
    return names


def crash_before(monkeypatch, module, name):
    """Make the first call of `module.<name>` end the run as a crash would."""

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, crash)
