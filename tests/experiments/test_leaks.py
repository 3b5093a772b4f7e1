"""No file of a default run tells an exact private statistic; the search that says so finds whatever is planted."""

import base64
import gzip
import json
import pathlib
import shutil
import stat
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dplora_jax.privacy import clipping
from experiments import run
from tests.experiments import leaks, reductions

CLIP = 3.0


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
        "--max_length=8", "--clients=3", "--rounds=8", "--local_steps=2", "--expected_batch_size=8", "--rank=2",
        "--noise_multiplier=1", "--delta=1e-3", "--client_lr=0.1", "--head_lr=1", "--server_momentum=0.5", "--ema=0.5",
        "--eval_every=2", "--mesh=1x1", "--seed=6", f"--clip_norm={CLIP}",
    ]  # fmt: skip
    real = clipping.clipped_grad_sum

    def overheard(loss_fn, adapter, batch, clip_norm, weights, *options, **how):
        out = real(loss_fn, adapter, batch, clip_norm, weights, *options, **how)
        jax.debug.callback(lambda *x: heard.append([np.array(v) for v in x]), out[1], out[2], weights)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clipping, "clipped_grad_sum", overheard)
        assert run.main([*command, f"--workdir={root / 'default'}"]) == 0
    assert run.main([*command, f"--workdir={root / 'told'}", "--private_diagnostics"]) == 0
    told, lines = (
        lines_of(root / "told" / "private" / "diagnostics.jsonl"),
        lines_of(root / "default" / "metrics.jsonl"),
    )
    clients = json.loads((root / "default" / "config.json").read_text())["federation"]["clients"]
    totals, counts, sought = statistics(heard, told, lines, np.array([client["records"] for client in clients]))
    return root / "default", Told(totals, counts, sought), root / "told"


class Told(NamedTuple):
    """What a run must not tell: sums over sampled records and their counts, [rounds, clients, steps], and all of it."""

    totals: dict
    counts: np.ndarray
    sought: leaks.Sought


def statistics(heard, told, lines, sizes):
    """(totals, counts, `leaks.Sought`): every row's norm and loss, and whatever is reckoned from these and from counts.

    A callback comes when it likes: the diagnostics say whose step it was. What equals a public share by chance is left out.
    """
    fields = {name: np.array([line[name] for line in told], float) for name in ("loss", "clip_fraction", "sampled")}
    counts = fields["sampled"]
    totals = {name: np.full(counts.shape, np.nan) for name in ("loss", "norm", "clipped")}
    singles = {*fields["loss"].ravel().tolist()}
    for norms, losses, weights in heard:
        norms, losses = (x[weights > 0].astype(float) for x in (norms, losses))
        apart = np.abs(fields["loss"] - losses.mean())  # two programs, whose roundings grow apart over the rounds
        apart[(counts != len(norms)) | ~np.isnan(totals["loss"])] = np.inf
        where = np.unravel_index(apart.argmin(), apart.shape)
        assert apart[where] < 1e-3
        for name, rows in ("loss", losses), ("norm", norms), ("clipped", norms > CLIP):
            totals[name][where] = rows.sum()
        singles |= {*norms.tolist(), *losses.tolist()}
    assert (np.abs(totals["clipped"] - fields["clip_fraction"] * counts) < 1.5).all()
    assert 0 < totals["clipped"].sum() < counts.sum()
    more, series = reductions.every(totals, counts, sizes)
    pairs = counts.reshape(-1, 2, *counts.shape[1:]).sum(1)  # of two rounds, as dispatches go
    also, by_dispatch = reductions.every(
        {n: x.reshape(-1, 2, *x.shape[1:]).sum(1) for n, x in totals.items()}, pairs, sizes
    )
    seconds = np.array([line["seconds"] for line in lines[1:]])
    rates = counts.sum((1, 2)) / seconds, pairs.sum((1, 2)) / seconds.reshape(-1, 2).sum(1)
    # What is shown of time follows from public sizes; a statistic that equals a public number by chance tells nothing.
    np.testing.assert_allclose([line["examples_per_second"] for line in lines[1:]], 3 * 2 * 8 / seconds, rtol=1e-9)
    names = ("accuracy", "macro_f1", "seconds", "examples_per_second")
    public = {line[name] for line in lines for name in names if line.get(name)} | {8 / n for n in sizes}
    singles = (singles | more | also).union(*map(np.ndarray.tolist, rates))
    singles = {x for x in singles if not np.isclose(x, list(public), 1e-6).any()}
    return totals, counts, leaks.Sought(singles, series | by_dispatch)


def alarms(folder, sought):
    """What the search finds in a run's public files: {(file, how)}."""
    found = ((path.relative_to(folder), how) for path, how in leaks.search(folder, sought))
    return {(str(path), how) for path, how in found if path.parts[0] != "private"}


def test_no_file_of_a_default_run_holds_an_exact_private_statistic(runs):
    """Of some 5,000 floats and 3,500 series. What leaks is in both of two runs of one seed; what a clock or a compressed byte
    happens to spell is not."""
    folder, told, other = runs
    assert len(told.sought.singles) > 4000
    assert len(told.sought.series) > 3000
    files = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
    assert files >= {"checkpoints", "adapter", "report.html", "privacy_ledger.jsonl", "config.json", "metrics.jsonl"}
    assert len(list(leaks.checkpoints(folder))) == 2
    assert all(len(arrays) > 5 for _, arrays in leaks.checkpoints(folder))
    assert not alarms(folder, told.sought) & alarms(other, told.sought)
    assert not (folder / "private").exists()


def test_diagnostics_lie_apart_labelled_and_for_the_owner_alone(runs):
    _, (*_, sought), told = runs
    file = told / "private" / "diagnostics.jsonl"
    assert file in {path for path, _ in leaks.search(told, sought)}
    assert all("PRIVATE" in line["note"] for line in lines_of(file))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def checkpoint(write):
    def plant(folder, told):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "checkpoints" / "9" / "state", {"a": {"b": write(told)}})

    return plant


def text(write):
    return lambda folder, told: (folder / "report.html").write_text(write(told))


def binary(write):
    return lambda folder, told: (folder / "notes.bin").write_bytes(write(told))


def by_round(name, write):
    """One line a round, as metrics.jsonl has them, with one more field."""
    lines = lambda told: [json.dumps({"round": i, "seconds": 0.1, name: x}) for i, x in enumerate(write(told), 1)]  # noqa: E731
    return lambda folder, told: (folder / "metrics.jsonl").write_text("\n".join(lines(told)))


def mean(told, name="loss", axes=(1, 2)):
    return told.totals[name].sum(axes) / told.counts.sum(axes)


def step_loss(told):
    return np.float32(mean(told, axes=())[1, 2, 0])


def a_clients(told):
    return told.counts[:, 0].ravel()


def shares(told):
    return (told.totals["clipped"] / told.counts).mean((1, 2))


PLANTS = {
    "repr": text(lambda told: f"<p>{float(step_loss(told))!r}</p>"),
    "json": text(lambda told: json.dumps({"deep": [{"er": float(step_loss(told))}]})),
    "fixed": text(lambda told: f"{step_loss(told):.6f}"),
    "scientific": text(lambda told: f"{step_loss(told):.5e}"),
    "key": text(lambda told: '{"clip_fraction": 0.5}'),
    "series as text": text(lambda told: ", ".join(f"{n:g}" for n in a_clients(told))),
    "series as rows": text(lambda told: "".join(f"<td>{n:.1f}</td>" for n in a_clients(told))),
    "float32": binary(lambda told: b"odd" + step_loss(told).tobytes()),
    "rounded float64": binary(lambda told: b"x" + step_loss(told).astype(">f8").tobytes()),
    "float64": binary(lambda told: b"odd" + mean(told)[1].tobytes()),
    "gzip": binary(lambda told: gzip.compress(step_loss(told).tobytes())),
    "base64": binary(lambda told: b"data:" + base64.b64encode(np.full(6, step_loss(told)).tobytes())),
    "checkpoint": checkpoint(lambda told: step_loss(told) * np.ones((3, 1), np.float32)),
    "series in a checkpoint": checkpoint(lambda told: np.array([0, *a_clients(told)], np.int32)),
    "column of a checkpoint": checkpoint(lambda told: np.stack([np.arange(8), told.counts.sum((1, 2))], 1)),
    "counts as int32": binary(lambda told: b"odd" + told.counts.astype("<i4").tobytes()),
    "a client's counts as int64": binary(lambda told: a_clients(told).astype(">i8").tobytes()),
    "joined by round": by_round("joined", lambda told: told.counts.sum((1, 2)).astype(int).tolist()),
    "joined by client": by_round("joined", lambda told: told.counts.sum(2).astype(int).tolist()),
    "joined by step": by_round("joined", lambda told: told.counts[:, 1, 0].astype(int).tolist()),
    "joined by client and step": by_round("x", lambda told: [{"k": x} for x in told.counts.astype(int).tolist()]),
    "joined so far": by_round("joined", lambda told: told.counts.sum((1, 2)).cumsum().astype(int).tolist()),
    "joined by dispatch": by_round("x", lambda told: told.counts.reshape(4, -1).sum(1).astype(int).tolist()),
    "losses of four digits": by_round("mean", lambda told: mean(told).round(4).tolist()),
    "a client's losses so far": by_round("x", lambda told: mean(told, axes=2)[:, 1].cumsum().round(3).tolist()),
    "table rows": text(
        lambda told: "".join(f"<tr><td>{i}<td>0.1<td>{n:.0f}" for i, n in enumerate(told.counts.sum((1, 2))))
    ),
    "norm": text(lambda told: f"{mean(told, 'norm')[2]!r}"),
    "norms of four digits": text(lambda told: " ".join(f"{x:.4g}" for x in mean(told, "norm"))),
    "total norm": text(lambda told: f"<b>{told.totals['norm'].sum():.4f}</b>"),
    "clip fraction": text(lambda told: f"{shares(told)[0]!r}"),
    "clip fractions": by_round("x", lambda told: shares(told).round(3).tolist()),
    "shares that join": by_round("x", lambda told: (told.counts[:, 1].sum(1) / 20).tolist()),
    "share of those that join": text(lambda told: f"{told.totals['clipped'][:, 0].sum() / told.counts[:, 0].sum()!r}"),
}  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_the_search_finds_what_is_planted(runs, plant, tmp_path):
    _, told, folder = runs
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(folder / "metrics.jsonl", run)
    assert leaks.search(run, told.sought) == []
    PLANTS[plant](run, told)
    assert leaks.search(run, told.sought)
