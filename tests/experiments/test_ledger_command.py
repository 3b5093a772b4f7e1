"""`python -m experiments.ledger` tells a person what a run was charged, and refuses whatever does not hold, without JAX."""

import json
import math
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
    planned = [accounting.epsilon(m, 8, DELTA) for m in MECHANISMS]
    clients = [
        describe(m) | {"client": k, "epsilon": e} for k, (m, e) in enumerate(zip(MECHANISMS, planned, strict=True))
    ]
    facts = {
        "delta": DELTA, "trust": "local", "seed": None, "clients": 2, "rounds": 4, "local_steps": 2, "epsilon": 40.0,
        "noise_multiplier": None, "federation": {"clients": clients, "release": "for release"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(facts))
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


def test_an_old_checkpoint_that_was_being_removed_when_the_run_was_killed_is_no_damage(workdir):
    (workdir / "checkpoints" / "2" / "notes" / "metadata").unlink()
    assert ledger.main(["verify", str(workdir)]) == 0


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
        (lambda w: edit(w / "config.json", lambda c: c.update(delta=1e-9)), "epsilon does not follow"),
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


def config(**values):
    return lambda w: edit(w / "config.json", lambda c: c.update(values))


def facts(**values):
    return lambda w: edit(w / "config.json", lambda c: c["federation"].update(values))


def row(**values):
    return lambda w: edit(w / "config.json", lambda c: c["federation"]["clients"][1].update(values))


def line(number, **values):
    return lambda w: edit_lines(w, lambda lines: lines[number].update(values))


def spent(number, *values):
    return line(number, epsilon=list(values), epsilon_max=max(values))


TAMPERINGS = {
    "release, from its seed": (facts(release="NOT FOR RELEASE: --seed"), "it says 'NOT FOR RELEASE"),
    "seed and release": (lambda w: (config(seed=3)(w), facts(release="NOT FOR RELEASE")(w)), "entry 1 has other release"),
    "trust to none": (config(trust="none"), "by its trust and seed the run is NO PRIVACY"),
    "trust to none, release": (lambda w: (config(trust="none")(w), facts(release=None)(w)), "entry 1 has other release"),
    "trust to distributed": (
        lambda w: (reforge(w, newer(trust="local")), config(trust="distributed")(w)), "entry 1 has other trust"
    ),
    "delta, a little": (lambda w: (reforge(w, newer(delta=DELTA)), config(delta=DELTA * 1.001)(w)), "entry 1 has other delta"),
    "seed of a nonce": (
        lambda w: (
            reforge(w, newer(release="NOT FOR RELEASE", nonce="00")),
            config(seed=3)(w), facts(release="NOT FOR RELEASE")(w),
        ),
        "entry 1 has other seed",
    ),
    "local_steps": (config(local_steps=1), "entry 1 has other local_steps"),
    "rounds": (config(rounds=3), "entry 3 has other rounds"),
    "budget": (config(epsilon=0.1), "client 0's epsilon does not follow"),
    "sigma": (config(noise_multiplier=9.0), "noise_multiplier is not client 0's"),
    "planned epsilon": (row(epsilon=0.1), "client 1's epsilon does not follow"),
    "planned epsilon NaN": (row(epsilon=math.nan), "client 1's epsilon does not follow"),
    "no noise_multiplier": (lambda w: edit(w / "config.json", lambda c: c["federation"]["clients"][0].pop("noise_multiplier")),
                            "config.json is damaged"),
    "delta x": (config(delta="x"), "config.json is damaged"),
    "rows that are no objects": (facts(clients=[1, 2]), "config.json is damaged"),
    "a row too few": (lambda w: edit(w / "config.json", lambda c: c["federation"]["clients"].pop()), "is damaged"),
    "epsilon_max": (line(3, epsilon_max=0.1), "another epsilon_max in round 3"),
    "epsilon NaN": (spent(4, math.nan, math.nan), "no epsilon for each client in round 4"),
    "epsilon inf": (spent(4, "inf", "inf"), "no epsilon for each client in round 4"),
    "a client too few": (spent(3, 40.0), "no epsilon for each client in round 3"),
    "an earlier round": (spent(1, 0.01, 0.01), "less epsilon than was charged up to round 1"),
    "a round after the lost attempt": (
        lambda w: edit_lines(w, lambda lines: lines[3].update({k: lines[2][k] for k in ("epsilon", "epsilon_max")})),
        "less epsilon than was charged up to round 3",
    ),
    "an earlier round above a later one": (spent(2, 90.0, 90.0), "less epsilon in round 3 than in round 2"),
    "a round missing": (lambda w: edit_lines(w, lambda lines: lines.pop(2)), "once, in order"),
    "a round doubled": (lambda w: edit_lines(w, lambda lines: lines.insert(2, lines[2])), "once, in order"),
    "the last round missing": (lambda w: edit_lines(w, lambda lines: lines.pop()), "does not end with round 4"),
    "a line's release": (line(3, release="NOT FOR RELEASE"), "of round 3, and the ledger"),
    "no epsilon_max": (lambda w: edit_lines(w, lambda lines: lines[1].pop("epsilon_max")), "metrics.jsonl is damaged"),
    "an epsilon too large for a float": (line(1, epsilon=[10**400, 1]), "metrics.jsonl is damaged"),
    "an anchor's text": (lambda w: write_checkpoint(w, 5, {"entries": "5", "head": "0"}), "checkpoint 5 is damaged"),
    "a seal that is not ASCII": (
        lambda w: edit(w / "privacy_ledger.head", lambda h: h.update(seal="é\ud800")), "seal does not fit"
    ),
    "secrets": (lambda w: (w / "private" / "secrets.json").write_text("[1]"), "secrets.json is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_what_no_honest_run_writes_is_refused(workdir, capsys, name):
    damage, words = TAMPERINGS[name]
    damage(workdir)
    code, out, err = run(capsys, "verify", workdir)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


@pytest.mark.parametrize(
    "change",
    [
        unfinished,
        lambda w: (unfinished(w), edit_lines(w, lambda lines: lines.pop())),  # killed before the lines of a dispatch
        lambda w: (unfinished(w), (w / "metrics.jsonl").unlink()),
        lambda w: reforge(w, newer(trust="local", delta=DELTA, nonce="00ff")),
        lambda w: (w / "private" / "secrets.json").write_bytes(bytes(135)),  # killed while they were destroyed
        lambda w: edit(  # an earlier version's
            w / "config.json", lambda c: [(r.pop("bands"), r.pop("count_noise")) for r in c["federation"]["clients"]]
        ),
    ],
    ids=["unfinished", "fewer lines", "no lines", "newer entries", "secrets overwritten", "older config"],
)
def test_what_an_honest_run_can_leave_holds(workdir, capsys, change):
    change(workdir)
    assert run(capsys, "verify", workdir)[0] == 0


def test_an_unfinished_run_cannot_show_another_delta(workdir, capsys):
    unfinished(workdir)
    config(delta=1e-12)(workdir)
    assert run(capsys, "verify", workdir)[0] == 2


def test_within_a_dispatch_the_grid_is_coarser_and_epsilon_never_falls(workdir, capsys):
    """Small epsilons show it: the bound on the coarse grid is above the fine one at the dispatch's end, which caps it."""
    quiet = Mechanism(100, 0.2, 35, 40.0)
    reforge(workdir, newer(clients=[describe(quiet)] * 2))
    facts(clients=[describe(quiet) | {"epsilon": accounting.epsilon(quiet, 8, DELTA)}] * 2)(workdir)
    (one, five), (two, six) = (
        accounting.epsilon_curve(quiet, c, DELTA, g) for c, g in (((2, 10), 1e-2), ((4, 12), 1e-3))
    )
    assert five > six

    def shown(*values):
        write_lines(workdir, [{"round": r, "epsilon": [e, e], "epsilon_max": e} for r, e in enumerate(values)])
        return run(capsys, "verify", workdir)

    assert shown(0, min(one, two), two, min(five, six), six)[0] == 0
    assert "less epsilon in round 4 than in round 3" in shown(0, min(one, two), two, five, six)[2]


@pytest.mark.parametrize(
    "more",
    [
        ["--epsilon=8", "--seed=2"],
        ["--trust=distributed", "--epsilon=8"],
        ["--trust=client", "--noise_multiplier=2", "--client_rate=0.5", "--seed=2"],
        ["--trust=none"],
    ],
)
def test_a_finished_run_of_each_mode_holds(more, tiny_bert, finance_table, tmp_path, capsys):
    from experiments import run as program

    command = [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=3", "--rounds=3", "--expected_batch_size=8", "--head_only", "--delta=1e-3",
        "--eval_every=0", "--dispatch_rounds=2", f"--workdir={tmp_path}", *more,
    ]  # fmt: skip
    assert program.main(command) == 0
    capsys.readouterr()
    code, out, err = run(capsys, "verify", tmp_path)
    assert (code, err) == (0, "")
    seeded = "--seed=2" in more
    assert ("seals fit, but anyone" if seeded else "cannot be checked") in out
    if seeded:
        edit(tmp_path / "config.json", lambda c: c.update(seed=None))
        assert "NOT FOR RELEASE" in run(capsys, "verify", tmp_path)[2]
        facts(release="for release")(tmp_path)
        assert "entry 1 has other release" in run(capsys, "verify", tmp_path)[2]


def test_other_command_lines_are_refused(tmp_path, capsys):
    for arguments in ([], ["show"], ["burn", tmp_path]):
        assert run(capsys, *arguments)[0] == 2


def test_runs_killed_at_every_boundary_lose_no_round_and_pay_for_none_twice():
    """From begin to commit and at the end, with torn lines, by SIGKILL; the adapter is the uninterrupted run's bit for bit."""
    script = pathlib.Path(__file__).parent / "kill_stress.py"
    done = subprocess.run([sys.executable, script, "--boundaries"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("9 kills: no round lost")
