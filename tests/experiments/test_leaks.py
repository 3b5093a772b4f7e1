"""No file of a default run tells an exact private statistic; the search that says so finds whatever is planted."""

import base64
import gzip
import itertools
import json
import pathlib
import shutil
import stat

import jax
import leaks
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dplora_jax.privacy import clipping
from experiments import run


def lines_of(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(quick_compile, tiny_bert, finance_table, tmp_path_factory):
    """(workdir of a default run, its private statistics, workdir of the same run with diagnostics).

    The default run itself tells each row's norm and loss, to this test alone. --seed makes both runs, and a passing test,
    repeatable; it is the only flag here that touches what is written.
    """
    root, heard = tmp_path_factory.mktemp("leaks"), []
    command = [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=3", "--rounds=4", "--local_steps=2", "--expected_batch_size=8", "--rank=2",
        "--noise_multiplier=1", "--delta=1e-3", "--client_lr=0.1", "--head_lr=1", "--server_momentum=0.5", "--ema=0.5",
        "--eval_every=2", "--mesh=1x1", "--seed=1", "--clip_norm=3",
    ]  # fmt: skip
    real = clipping.clipped_grad_sum

    def overheard(loss_fn, adapter, batch, clip_norm, weights, *options):
        out = real(loss_fn, adapter, batch, clip_norm, weights, *options)
        jax.debug.callback(lambda *x: heard.append([np.array(v) for v in x]), out[1], out[2], weights)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clipping, "clipped_grad_sum", overheard)
        assert run.main([*command, f"--workdir={root / 'default'}"]) == 0
    assert run.main([*command, f"--workdir={root / 'told'}", "--private_diagnostics"]) == 0
    told = lines_of(root / "told" / "private" / "diagnostics.jsonl")
    return root / "default", statistics(heard, told, lines_of(root / "default" / "metrics.jsonl")), root / "told"


def statistics(heard, told, lines):
    """(floats that no file may hold, series of numbers that none may) of a run's rows, as floats and as they come."""
    rows = [(norms[weights > 0], losses[weights > 0]) for norms, losses, weights in heard]
    assert len(rows) == 4 * 3 * 2
    single = [
        x for pair in rows for values in pair for x in (*values, values.mean(dtype=float), values.sum(dtype=float))
    ]
    fields = {name: np.array([line[name] for line in told], float) for name in ("loss", "clip_fraction", "sampled")}
    for name, axes in itertools.product(("loss",), (0, 1, 2, (0, 1), (0, 2), (1, 2), (0, 1, 2))):
        single += np.atleast_1d(fields[name].mean(axes)).reshape(-1).tolist()
    single += fields["loss"].reshape(-1).tolist()
    series = []
    for values in fields.values():  # [rounds, clients, steps]
        by_client = [values[:, k] for k in range(values.shape[1])]
        series += [
            x.reshape(-1).tolist() for x in (*values, *by_client, values.sum((1, 2)), values.mean((1, 2)), values)
        ]
    seconds = [line["seconds"] for line in lines[1:]]
    sampled = fields["sampled"].sum((1, 2))
    rates = [n / s for n, s in zip(sampled, seconds, strict=True)]
    rates += [sampled[i : i + 2].sum() / sum(seconds[i : i + 2]) for i in (0, 2)]
    assert not np.isclose(fields["sampled"].sum((1, 2)), 3 * 2 * 8).any(), "a private rate would equal the public one"
    assert 0 < fields["clip_fraction"].mean() < 1
    return single + rates, [x for x in series if len(set(x)) > 2]


def test_no_file_of_a_default_run_holds_an_exact_private_statistic(runs):
    """Of some 800 floats and 30 series. False alarms: under 1 % of seeds."""
    folder, (single, series), _ = runs
    assert len(set(single)) > 300
    assert len(series) > 10
    files = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
    assert files >= {"checkpoints", "adapter", "report.html", "privacy_ledger.jsonl", "config.json", "metrics.jsonl"}
    assert len(list(leaks.checkpoints(folder))) == 2
    assert all(len(arrays) > 5 for _, arrays in leaks.checkpoints(folder))
    assert leaks.search(folder, single, series) == []
    assert not (folder / "private").exists()


def test_diagnostics_lie_apart_labelled_and_for_the_owner_alone(runs):
    _, (single, series), told = runs
    file = told / "private" / "diagnostics.jsonl"
    assert {path for path, _ in leaks.search(told, single, series)} == {file}
    assert all("PRIVATE" in line["note"] for line in lines_of(file))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def checkpoint(write):
    def plant(folder, x, many):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "checkpoints" / "9" / "state", {"a": {"b": write(x, many)}})

    return plant


def text(write):
    return lambda folder, x, many: (folder / "report.html").write_text(write(x, many))


def binary(write):
    return lambda folder, x, many: (folder / "notes.bin").write_bytes(write(x, many))


PLANTS = {
    "repr": text(lambda x, _: f"<p>{float(x)!r}</p>"),
    "json": text(lambda x, _: json.dumps({"deep": [{"er": float(x)}]})),
    "fixed": text(lambda x, _: f"{x:.6f}"),
    "scientific": text(lambda x, _: f"{x:.5e}"),
    "key": text(lambda x, _: '{"clip_fraction": 0.5}'),
    "series as text": text(lambda _, many: ", ".join(f"{n:g}" for n in many)),
    "series as rows": text(lambda _, many: "".join(f"<td>{n:.1f}</td>" for n in many)),
    "float32": binary(lambda x, _: b"odd" + np.float32(x).tobytes()),
    "float64": binary(lambda x, _: b"x" + np.array(np.float32(x)).astype(">f8").tobytes()),
    "gzip": binary(lambda x, _: gzip.compress(np.float32(x).tobytes())),
    "base64": binary(lambda x, _: b"data:" + base64.b64encode(np.full(6, np.float32(x)).tobytes())),
    "checkpoint": checkpoint(lambda x, _: np.float32(x) * np.ones((3, 1), np.float32)),
    "series in a checkpoint": checkpoint(lambda _, many: np.array([0, *many], np.int32)),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_the_search_finds_what_is_planted(runs, plant, tmp_path):
    _, (single, series), told = runs
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(told / "metrics.jsonl", folder)
    assert leaks.search(folder, single, series) == []
    counts = np.array([line["sampled"] for line in lines_of(told / "private" / "diagnostics.jsonl")])[:, 0].reshape(-1)
    PLANTS[plant](folder, single[3], counts)
    assert leaks.search(folder, single, series)
