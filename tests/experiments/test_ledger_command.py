"""`python -m experiments.ledger` tells a person what a run was charged, and refuses whatever does not hold, without JAX."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dplora_jax.privacy import accounting
from dplora_jax.privacy.accounting import Mechanism
from dplora_jax.privacy.ledger import Ledger, describe
from experiments import ledger

ROOT = pathlib.Path(__file__).parents[2]
MECHANISMS = [Mechanism(100, 0.2, 35, 1.1), Mechanism(50, 0.4, 50, 1.3)]
DELTA = 1e-3
SECRETS = [b"a" * 32, b"b" * 32]


@pytest.fixture
def workdir(tmp_path):
    """The public files of a run that lost one attempt at rounds 3 and 4, as the program leaves them, and its secrets."""
    kept = Ledger(tmp_path / "privacy_ledger.jsonl")
    kept.seal_with(b"".join(SECRETS))
    for rounds, attempt, mesh in ((1, 3), 0, "one"), ((3, 5), 0, "one"), ((3, 5), 1, "two"):
        kept.begin(rounds, attempt, MECHANISMS, 2, {"mesh": mesh, "code": "same"}, release="for release")
        if mesh == "two" or rounds == (1, 3):
            write_checkpoint(tmp_path, rounds[1] - 1, kept.anchor)
            kept.commit(rounds, attempt)
    kept.append(entry="end", round=4)
    clients = [describe(m) | {"client": k, "epsilon": 1.0} for k, m in enumerate(MECHANISMS)]
    facts = {"delta": DELTA, "trust": "local", "seed": None, "clients": 2, "federation": {"clients": clients}}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    spent = [accounting.epsilon(m, 12, DELTA) for m in MECHANISMS]
    lines = [{"round": number, "epsilon": spent} for number in range(5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secrets.json").write_text(json.dumps([secret.hex() for secret in SECRETS]))
    return tmp_path


def write_checkpoint(workdir, number, anchor):
    folder = workdir / "checkpoints" / str(number) / "notes"
    folder.mkdir(parents=True)
    (folder / "metadata").write_text(json.dumps({"lines": [], "ledger": anchor}))


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def run(capsys, *arguments):
    """(exit code, stdout, stderr)"""
    code = ledger.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, " ".join(said.out.split()), said.err


def test_show_tells_every_dispatch_and_every_clients_epsilon(workdir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    code, out, _ = run(capsys, "show", workdir)
    assert code == 0
    for words in (
        "1 to 2 │ 0 │ 2 │ 1.1 to 1.3 │ 0.2 to 0.4 │ committed │ │",
        "3 to 4 │ 0 │ 2 │ 1.1 to 1.3 │ 0.2 to 0.4 │ lost, paid for │ │",
        "3 to 4 │ 1 │ 2 │ 1.1 to 1.3 │ 0.2 to 0.4 │ committed │ mesh │",
        "run finished; 6 entries: 3 dispatches begun, 2 committed; 6 rounds charged",
        "the chain holds against privacy_ledger.head and checkpoint 2 and checkpoint 4",
        "seals fit the run's secrets",
    ):
        assert words in out, words
    for client, mechanism in enumerate(MECHANISMS):
        rounded = ledger._upwards(accounting.epsilon(mechanism, 12, DELTA))
        values = (
            f"{mechanism.records} │ {mechanism.sampling_rate} │ {mechanism.capacity} │ {mechanism.noise_multiplier}"
        )
        assert f"│ {client} │ {values} │ {rounded} │" in out
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_verify_says_that_it_holds_after_the_secrets_are_gone_too(workdir, capsys):
    (workdir / "private" / "secrets.json").unlink()
    code, out, _ = run(capsys, "verify", workdir)
    assert code == 0
    assert "holds: 3 dispatches begun" in out
    assert "the secrets are destroyed, or not here" in out


def test_jax_is_not_needed(workdir):
    code = "import sys; from experiments import ledger; sys.exit(ledger.main(sys.argv[1:]) or 'jax' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert (
        subprocess.run(
            [sys.executable, "-c", code, "show", workdir], env=environment, stdout=subprocess.DEVNULL
        ).returncode
        == 0
    )


def shorten(workdir):
    path = workdir / "privacy_ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def rewrite(workdir, seal):
    """Drop the lost attempt and rewrite chain and head file consistently, as whoever has the secret could if `seal`."""
    path = workdir / "privacy_ledger.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    path.with_suffix(".head").unlink()
    forged = Ledger(path)
    if seal:
        forged.seal_with(b"".join(SECRETS))
    for entry in entries:
        if (entry.get("rounds"), entry.get("attempt")) != ([3, 5], 0):
            forged.append(**{name: value for name, value in entry.items() if name not in ("previous", "seal")})


def lose_checkpoints(workdir):
    for path in (workdir / "checkpoints").rglob("metadata"):
        path.unlink()
    for path in (workdir / "checkpoints").glob("*"):
        (path / "notes").rmdir()
        path.rmdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shorten, "its end was removed"),
        (lambda w: rewrite(w, seal=True), "checkpoint 4 knows"),
        (lambda w: (lose_checkpoints(w), rewrite(w, seal=False)), "seal does not fit"),
        (
            lambda w: edit(w / "config.json", lambda c: c["federation"]["clients"][1].update(noise_multiplier=2.0)),
            "entry 1",
        ),
        (lambda w: edit(w / "config.json", lambda c: c.update(delta=1e-9)), "less epsilon than was charged"),
        (lambda w: (w / "metrics.jsonl").write_text('{"round": 5, "epsilon": [9, 9]}\n'), "never committed"),
        (lambda w: (w / "metrics.jsonl").write_text("{"), "metrics.jsonl is damaged"),
        (lambda w: (w / "checkpoints" / "4" / "notes" / "metadata").write_text("{}"), "4 is damaged"),
        (lambda w: (w / "config.json").unlink(), "config.json does not exist"),
        (lambda w: (w / "config.json").write_text("[]"), "config.json is damaged"),
        (
            lambda w: (lose_checkpoints(w), [p.unlink() for p in w.glob("privacy_ledger.*")]),
            "nothing was charged there yet",
        ),
    ],
)
@pytest.mark.parametrize("command", ["show", "verify"])
def test_what_does_not_hold_is_one_sentence_and_exit_2(workdir, capsys, command, damage, words):
    damage(workdir)
    code, out, err = run(capsys, command, workdir)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


def test_other_command_lines_are_refused(tmp_path, capsys):
    for arguments in ([], ["show"], ["burn", tmp_path]):
        assert run(capsys, *arguments)[0] == 2


def test_runs_killed_at_every_boundary_lose_no_round_and_pay_for_none_twice():
    """From begin to commit and at the end, with torn lines, by SIGKILL; the adapter is the uninterrupted run's bit for bit."""
    script = pathlib.Path(__file__).parent / "kill_stress.py"
    done = subprocess.run([sys.executable, script, "--boundaries"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("9 kills: no round lost")
