"""`python -m experiments.ledger` tells a person what a run was charged, and refuses whatever does not hold, without JAX."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from dplora_jax.privacy import accounting
from dplora_jax.privacy.ledger import Ledger
from experiments.text import formats
from tests.experiments.ledger_workdirs import (
    DELTA,
    MECHANISMS,
    SECRETS,
    edit,
    lose_checkpoints,
    run,
    write_lines,
    write_run,
)

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def workdir(tmp_path):
    return write_run(tmp_path)


def test_show_tells_every_dispatch_and_every_clients_epsilon(workdir, capsys):
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    noise = formats.span([m.noise_multiplier for m in MECHANISMS])
    code, out, _ = run(capsys, "show", workdir)
    assert code == 0
    for words in (
        f"1 to 2 0 2 {noise} 0.2 to 0.4 committed",
        f"3 to 4 0 2 {noise} 0.2 to 0.4 lost, paid for",
        f"3 to 4 1 2 {noise} 0.2 to 0.4 committed",
        "run finished; 6 entries: 3 dispatches begun, 2 committed; 6 rounds charged",
        "the chain holds against privacy_ledger.head and checkpoint 2 and checkpoint 4",
        "seals fit the run's secrets",
    ):
        assert words in out, words
    for client, mechanism in enumerate(MECHANISMS):
        rounded = formats.epsilon(accounting.epsilon(mechanism, 12, DELTA), 4)
        values = f"{mechanism.records} {mechanism.sampling_rate} {mechanism.capacity} {mechanism.noise_multiplier:.4g}"
        assert f" {client} {values} {rounded} " in out
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
        (lambda w: edit(w / "config.json", lambda c: c.update(delta=1e-9)), "do not follow from its fields"),
        (lambda w: write_lines(w, [{"round": 5, "epsilon": [9, 9], "epsilon_max": 9}]), "never committed"),
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
