"""What config.json and metrics.jsonl say is held against the ledger: what no honest run writes is refused, all else holds."""

import math

import pytest

from dplora_jax.federation import workdir_files
from dplora_jax.privacy import accounting
from experiments import ledger
from tests.experiments.ledger_workdirs import (
    DELTA,
    edit,
    edit_lines,
    facts,
    newer,
    reflag,
    reforge,
    run,
    unfinished,
    write_checkpoint,
    write_lines,
    write_run,
)
from tests.experiments.small_runs import fit


@pytest.fixture
def workdir(tmp_path):
    return write_run(tmp_path)


def config(**values):
    return lambda w: edit(w / "config.json", lambda c: c.update(values))


def row(**values):
    return lambda w: edit(w / "config.json", lambda c: c["federation"]["clients"][1].update(values))


def line(number, **values):
    return lambda w: edit_lines(w, lambda lines: lines[number].update(values))


def spent(number, *values):
    return line(number, epsilon=list(values), epsilon_max=max(values))


TAMPERINGS = {
    "release, from its seed": (facts(release="NOT FOR RELEASE: --seed"), "it says 'NOT FOR RELEASE"),
    "seed and release": (lambda w: (config(seed=3)(w), facts(release="NOT FOR RELEASE")(w)), "entry 1 has other release"),
    "trust to none": (config(trust="none", epsilon=None), "by its trust and seed the run is NO PRIVACY"),
    "trust to none, release": (
        lambda w: (config(trust="none", epsilon=None)(w), facts(release=None)(w)), "entry 1 has other release"
    ),
    "trust to distributed": (
        lambda w: (
            reforge(w, newer(trust="local")), config(trust="distributed", local_steps=1, survivors=2, colluding=1)(w),
        ),
        "entry 1 has other trust",
    ),
    "trust to distributed alone": (config(trust="distributed", local_steps=1), "trust=distributed has no survivors"),
    "delta, a little": (lambda w: (reforge(w, newer(delta=DELTA)), config(delta=DELTA * 1.001)(w)), "entry 1 has other delta"),
    "seed of a nonce": (
        lambda w: (
            reforge(w, newer(release="NOT FOR RELEASE", nonce="00")),
            config(seed=3)(w), facts(release="NOT FOR RELEASE")(w),
        ),
        "entry 1 has other seed",
    ),
    "local_steps": (config(local_steps=1), "entry 1 has other local_steps"),
    "rounds": (lambda w: ((w / "metrics.jsonl").unlink(), config(rounds=3)(w)), "entry 3 has other rounds"),
    "rounds, beside lines of more": (config(rounds=3), "it has more lines than rounds"),
    "budget": (config(epsilon=0.1), "client 0's noise_multiplier do not follow from its fields"),
    "sigma": (config(noise_multiplier=9.0, epsilon=None), "client 0's noise_multiplier do not follow from its fields"),
    "planned epsilon": (row(epsilon=0.1), "client 1's epsilon does not follow"),
    "planned epsilon NaN": (row(epsilon=math.nan), "epsilon is not a number from 0 to inf"),
    "no noise_multiplier": (lambda w: edit(w / "config.json", lambda c: c["federation"]["clients"][0].pop("noise_multiplier")),
                            "config.json is damaged"),
    "delta x": (config(delta="x"), "config.json is damaged"),
    "rows that are no objects": (facts(clients=[1, 2]), "config.json is damaged"),
    "a row too few": (lambda w: edit(w / "config.json", lambda c: c["federation"]["clients"].pop()), "is damaged"),
    "epsilon_max": (line(3, epsilon_max=0.1), "another epsilon_max in round 3"),
    "epsilon NaN": (spent(4, math.nan, math.nan), "epsilon has one that is not a number from 0 to inf"),
    "epsilon inf": (spent(4, "inf", "inf"), "no epsilon for each client in round 4"),
    "a client too few": (spent(3, 40.0), "no epsilon for each client in round 3"),
    "an earlier round": (spent(1, 0.01, 0.01), "less epsilon than was charged up to round 1"),
    "a round after the lost attempt": (
        lambda w: edit_lines(w, lambda lines: lines[3].update({k: lines[2][k] for k in ("epsilon", "epsilon_max")})),
        "less epsilon than was charged up to round 3",
    ),
    "an earlier round above a later one": (spent(2, 90.0, 90.0), "less epsilon in round 3 than in round 2"),
    "a round missing": (lambda w: edit_lines(w, lambda lines: lines.pop(2)), "once, in order"),
    "a round doubled": (lambda w: edit_lines(w, lambda lines: (lines.pop(), lines.insert(2, lines[2]))), "once, in order"),
    "the last round missing": (lambda w: edit_lines(w, lambda lines: lines.pop()), "does not end with round 4"),
    "a line's release": (line(3, release="NOT FOR RELEASE"), "of round 3, and the ledger"),
    "no epsilon_max": (lambda w: edit_lines(w, lambda lines: lines[1].pop("epsilon_max")), "metrics.jsonl is damaged"),
    "an epsilon too large for a float": (line(1, epsilon=[10**400, 1]), "metrics.jsonl is damaged"),
    "an anchor's text": (lambda w: write_checkpoint(w, 5, {"entries": "5", "head": "0"}), "checkpoints/5 is damaged"),
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
    reflag(workdir, sizes=(100, 100), epsilon=None, noise_multiplier=40.0)
    quiet = workdir_files.read_config(workdir).mechanisms[0]
    (one, five), (two, six) = (
        accounting.epsilon_curve(quiet, c, DELTA, g) for c, g in (((2, 10), 1e-2), ((4, 12), 1e-3))
    )
    assert five > six

    def shown(*values):
        write_lines(workdir, [{"round": r, "epsilon": [e, e], "epsilon_max": e} for r, e in enumerate(values)])
        return run(capsys, "verify", workdir)

    assert shown(0, min(one, two), two, min(five, six), six)[0] == 0
    assert "less epsilon in round 4 than in round 3" in shown(0, min(one, two), two, five, six)[2]


def test_an_old_checkpoint_that_was_being_removed_when_the_run_was_killed_is_no_damage(workdir):
    (workdir / "checkpoints" / "2" / "notes" / "metadata").unlink()
    assert ledger.main(["verify", str(workdir)]) == 0


@pytest.mark.parametrize(
    "more",
    [
        ["--epsilon=8", "--seed=2"],
        pytest.param(["--trust=distributed", "--epsilon=8"], marks=pytest.mark.slow),
        pytest.param(
            ["--trust=client", "--noise_multiplier=2", "--client_rate=0.5", "--seed=2"], marks=pytest.mark.slow
        ),
        ["--trust=none"],
    ],
)
def test_a_finished_run_of_each_mode_holds(more, tiny_bert, finance_table, tmp_path, capsys, quick_compile):
    command = [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=3", "--rounds=3", "--expected_batch_size=8", "--head_only", "--delta=1e-3",
        "--eval_every=0", "--dispatch_rounds=2", "--mesh=1x1", f"--workdir={tmp_path}", *more,
    ]  # fmt: skip
    fit(command)
    code, out, err = run(capsys, "verify", tmp_path)
    assert (code, err) == (0, "")
    seeded = "--seed=2" in more
    assert ("seals fit, but anyone" if seeded else "cannot be checked") in out
    if seeded:
        edit(tmp_path / "config.json", lambda c: c.update(seed=None))
        assert "NOT FOR RELEASE" in run(capsys, "verify", tmp_path)[2]
        facts(release="for release")(tmp_path)
        assert "entry 1 has other release" in run(capsys, "verify", tmp_path)[2]
