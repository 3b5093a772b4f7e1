"""The public files of a run of two clients that lost an attempt, as the program leaves them, and ways to damage them."""

import json

from dplora_jax.config import RunConfig, replace
from dplora_jax.federation import calibration, trust
from dplora_jax.federation.workdir_files import write_config
from dplora_jax.privacy import accounting
from dplora_jax.privacy.ledger import Ledger, describe
from experiments import cli, ledger

DELTA = 1e-3
CONFIG = cli.settle(
    replace(RunConfig(), epsilon=8, delta=DELTA, clients=2, rounds=4, local_steps=2, expected_batch_size=20)
)
MECHANISMS = calibration.mechanisms(CONFIG, [100, 50])
SECRETS = [b"a" * 32, b"b" * 32]


def write_run(tmp_path):
    """A run that lost one attempt at rounds 3 and 4, and its secrets -> its working directory."""
    kept = Ledger(tmp_path / "privacy_ledger.jsonl")
    kept.seal_with(b"".join(SECRETS))
    for rounds, attempt in ((1, 3), 0), ((3, 5), 0), ((3, 5), 1):
        kept.begin(rounds, attempt, MECHANISMS, 2, {"data": "d0", "base": "b0"}, release="for release")
        if (rounds, attempt) != ((3, 5), 0):
            write_checkpoint(tmp_path, rounds[1] - 1, kept.anchor)
            kept.commit(rounds, attempt)
    kept.append(entry="end", round=4)
    planned = [accounting.epsilon(m, 8, DELTA) for m in MECHANISMS]
    clients = [
        describe(m) | {"client": k, "epsilon": e} for k, (m, e) in enumerate(zip(MECHANISMS, planned, strict=True))
    ]
    write_config(tmp_path, CONFIG, {"clients": clients, "release": "for release"})
    paid = (
        (0, 1e-3),
        (2, 1e-2),
        (4, 1e-3),
        (10, 1e-2),
        (12, 1e-3),
    )  # local steps, the lost attempt's included, and the grid
    spent = [[accounting.epsilon(m, steps, DELTA, grid) for m in MECHANISMS] for steps, grid in paid]
    write_lines(
        tmp_path, [{"round": r, "epsilon": values, "epsilon_max": max(values)} for r, values in enumerate(spent)]
    )
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secrets.json").write_text(json.dumps([secret.hex() for secret in SECRETS]))
    return tmp_path


def write_lines(workdir, lines):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def edit_lines(workdir, change):
    """Change the list of metrics lines in place."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    change(lines)
    write_lines(workdir, lines)


def write_checkpoint(workdir, number, anchor):
    folder = workdir / "checkpoints" / str(number) / "notes"
    folder.mkdir(parents=True)
    (folder / "metadata").write_text(json.dumps({"lines": [], "ledger": anchor}))


def reflag(workdir, change=lambda mechanism: mechanism, sizes=(100, 50), **flagged):
    """Make the workdir that of an unfinished run with other flags, whose clients are charged for `change(their mechanism)`."""
    config = cli.settle(replace(CONFIG, **flagged))
    made = [change(mechanism) for mechanism in calibration.mechanisms(config, list(sizes))]
    steps = config.schedule.rounds * trust.mode(config).steps_per_round(config)
    rows = [
        describe(m)
        | {"records": n, "sampled_from": m.records, "epsilon": accounting.epsilon(m, steps, config.privacy.delta)}
        for m, n in zip(made, sizes, strict=True)
    ]
    write_config(workdir, config, {"clients": rows, "release": "for release"})
    more = {"clients": [describe(m) for m in made], "local_steps": trust.mode(config).steps_per_round(config)}
    reforge(workdir, lambda entry: None if entry["entry"] == "end" else newer(**more)(entry))
    (workdir / "metrics.jsonl").unlink()


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def run(capsys, *arguments):
    """(exit code, stdout, stderr)"""
    code = ledger.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, " ".join(said.out.split()), said.err


def reforge(workdir, change):
    """Rewrite chain and head file under the secrets, without checkpoints, each entry as `change(entry)`; None drops it."""
    path = workdir / "privacy_ledger.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    lose_checkpoints(workdir)
    path.unlink()
    path.with_suffix(".head").unlink()
    forged = Ledger(path)
    forged.seal_with(b"".join(SECRETS))
    for entry in entries:
        bare = change({name: value for name, value in entry.items() if name not in ("previous", "seal")})
        if bare is not None:
            forged.append(**bare)


def unfinished(workdir):
    reforge(workdir, lambda entry: None if entry["entry"] == "end" else entry)


def newer(**more):
    """A change that writes `more` into each begin entry, as later versions do."""
    return lambda entry: entry | more if entry["entry"] == "begin" else entry


def lose_checkpoints(workdir):
    for path in (workdir / "checkpoints").rglob("metadata"):
        path.unlink()
    for path in (workdir / "checkpoints").glob("*"):
        (path / "notes").rmdir()
        path.rmdir()


def facts(**values):
    return lambda w: edit(w / "config.json", lambda c: c["federation"].update(values))
