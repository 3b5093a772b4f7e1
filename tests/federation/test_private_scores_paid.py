"""Each evaluation on what clients keep back is paid for before it is made, and its noise is never drawn twice."""

import collections
import math
import shutil

import pytest

from dplora_jax.errors import InputError
from dplora_jax.federation import held_out, private_scores, storage
from dplora_jax.privacy import accounting, secrets, unit_scores
from dplora_jax.privacy.ledger import Ledger
from tests.federation import private_scoring
from tests.federation import small_federation as small
from tests.federation.private_scoring import KEYS, changed, entries, kept, run, run_lazily

pytestmark = pytest.mark.usefixtures("quick_compile")
EXACT = {"trust": "none", "epsilon": None}


@pytest.fixture(scope="module")
def federation():
    return private_scoring.maker()


def test_each_evaluation_is_an_entry_of_its_own_and_the_ledger_knows_its_cost(federation, tmp_path):
    made = federation(private_test_epsilon=5.0)
    rounds = run(made, workdir=tmp_path / "run")
    ledger = entries(tmp_path / "run")
    assert [entry["round"] for entry in ledger.evaluated] == [0, 2, 4]
    assert len(ledger.evaluated) == held_out.evaluations(made.config)
    assert ledger.test_epsilon(1e-3) == pytest.approx(5.0, rel=1e-3)
    assert ledger.test_epsilon(1e-3) <= 5.0
    assert max(ledger.epsilons(1e-3)) <= 8.0
    spent = [round.line["private_test_epsilon"] for round in rounds if "private_accuracy" in round.metrics]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(ledger.test_epsilon(1e-3))


def test_an_evaluation_is_charged_before_anything_is_computed(federation, tmp_path, monkeypatch):
    calls = []
    watched = [(Ledger, "evaluate"), (Ledger, "commit"), (storage.Workdir, "save"), (storage.Workdir, "release")]
    for owner, name in [*watched, (private_scores, "_outcomes"), (unit_scores, "total"), (unit_scores, "noisy")]:
        inner = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, name=name, inner=inner, **more: (calls.append(name), inner(*args, **more))[1]
        )
    run(federation(), workdir=tmp_path / "run")
    one = ["evaluate", "_outcomes", *["total", "noisy"] * 3, "save"]
    assert calls == [*one, "release", *[*one, "commit", "release"] * 2, "release"]


def crash_in_round(monkeypatch, number):
    """Make the evaluation of this round end the run as a crash would, when noise is drawn and nothing is released."""
    inner = unit_scores.noisy
    evaluations = iter([0, 2, 4])
    seen = collections.Counter()

    def crash(*args):
        seen["calls"] += 1
        if seen["calls"] % 3 == 1:
            seen["round"] = next(evaluations)
        drawn = inner(*args)
        if seen["round"] == number:
            raise KeyboardInterrupt
        return drawn

    monkeypatch.setattr(unit_scores, "noisy", crash)


def noise_keys(monkeypatch):
    """The keys of all noise that is drawn from here on, as a list."""
    keys, inner = [], unit_scores.noisy
    monkeypatch.setattr(
        unit_scores, "noisy", lambda summed, noise, bits, key: (keys.append(key), inner(summed, noise, bits, key))[1]
    )
    return keys


@pytest.mark.parametrize(("number", "shown"), [(0, [0, 4]), (2, [0, 4]), (4, [0, 2])])
def test_an_evaluation_that_a_crash_cut_off_stays_paid_for(federation, tmp_path, monkeypatch, number, shown):
    """Three are planned. A lost one is not made again for nothing: one is missing, and while there is one, it is kept for the
    last round. No key is used twice, and the budget holds."""
    keys = noise_keys(monkeypatch)
    with monkeypatch.context() as broken:
        crash_in_round(broken, number)
        with pytest.raises(KeyboardInterrupt):
            run(
                federation(seed=None, noise_multiplier=1.0, epsilon=None, private_test_epsilon=8.0),
                workdir=tmp_path / "run",
            )
    rounds = run(
        federation(seed=None, noise_multiplier=1.0, epsilon=None, private_test_epsilon=8.0), workdir=tmp_path / "run"
    )
    ledger = entries(tmp_path / "run")
    assert [round.number for round in rounds if "private_accuracy" in round.metrics] == shown
    assert len(ledger.evaluated) == 3
    assert ledger.test_epsilon(1e-3) <= 8.0
    assert len(set(keys)) == len(keys) == 7, "three clients' of two evaluations, and one of the lost"


def test_with_a_seed_a_lost_evaluation_is_made_again_as_it_was(federation, tmp_path, monkeypatch):
    whole = run(federation())
    with monkeypatch.context() as broken:
        crash_in_round(broken, 2)
        with pytest.raises(KeyboardInterrupt):
            run(federation(), workdir=tmp_path / "run")
    rounds = run(federation(), workdir=tmp_path / "run")
    assert [round.metrics for round in rounds] == [round.metrics for round in whole]
    assert [entry["round"] for entry in entries(tmp_path / "run").evaluated] == [0, 2, 4]


def test_a_run_that_was_left_keeps_back_the_same_records(federation, tmp_path):
    made = federation(seed=None)
    for round in made.fit(small.shards(), tmp_path / "run"):
        if round.number == 2:
            break
    first = secrets.load(tmp_path / "run" / "private")
    places = [p.places.tolist() for p in held_out.split(made.config, small.shards(), first)[1].parts.values()]
    held, inner = [], held_out.split
    again = federation(seed=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "split", lambda *args: (held.append(inner(*args)), held[-1])[1])
        run(again, workdir=tmp_path / "run")
    assert [part.places.tolist() for part in held[0][1].parts.values()] == places
    assert not (tmp_path / "run" / "private" / secrets.FILE).exists()


def test_no_two_clients_rounds_or_attempts_share_noise(federation, monkeypatch):
    keys = noise_keys(monkeypatch)
    run(federation(seed=None))
    run(federation())
    assert len(set(keys)) == len(keys) == 2 * 3 * 3
    digest = secrets.digest
    assert digest(KEYS[0], "test noise", 0, 0) in keys
    training = {digest(KEYS[k], purpose, r, 0) for k in range(3) for purpose in secrets.PURPOSES for r in range(9)}
    assert not training & set(keys)


def test_a_workdir_that_is_put_back_draws_no_noise_twice(federation, tmp_path, monkeypatch):
    """A disk's snapshot, say: the same rounds and attempts, under another history of the ledger."""
    keys = noise_keys(monkeypatch)
    next(federation(seed=None).fit(small.shards(), tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "snapshot")
    run(federation(seed=None), workdir=tmp_path / "run")
    run(federation(seed=None), workdir=tmp_path / "snapshot")
    assert len(set(keys)) == len(keys) == 3 * (1 + 2 + 2)


@pytest.mark.parametrize("trust", ["local", "distributed"])
def test_the_noise_of_the_honest_is_what_the_budget_asks_for(federation, monkeypatch, trust):
    """In mode `local` each client's own is enough; in mode `distributed` that of any two of three, the third being curious."""
    multipliers = []
    inner = unit_scores.noisy
    monkeypatch.setattr(
        unit_scores, "noisy", lambda summed, noise, *more: (multipliers.append(noise), inner(summed, noise, *more))[1]
    )
    made = federation(trust=trust)
    next(run_lazily(made))
    needed = held_out.noise_multiplier(made.config)
    honest = 1 if trust == "local" else 2
    assert multipliers == pytest.approx([needed / math.sqrt(honest)] * 3)
    assert accounting.full_epsilon([needed] * 3, 1e-3) <= 8.0


def test_other_records_among_those_kept_back_are_refused_on_resume(federation, tmp_path):
    made = federation()
    next(made.fit(small.shards(), tmp_path / "run"))
    other = changed(made, lambda client: kept(made).parts[client].places[:1])
    with pytest.raises(InputError, match="the records are not those"):
        run(federation(), other, tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"private_test": 0.5}, "`private_test`"), ({"private_test_epsilon": 1.0}, "`private_test_epsilon`"),
     ({"eval_every": 1}, "`eval_every`"), ({"clip_norm": 2.0}, "`clip_norm`")],
)  # fmt: skip
def test_what_decides_the_split_or_its_noise_is_fixed_once_an_evaluation_is_charged(
    federation, tmp_path, fields, words
):
    """Before the first round too: its evaluation has been paid for."""
    next(federation(seed=None).fit(small.shards(), tmp_path / "run"))
    assert not entries(tmp_path / "run").begun
    with pytest.raises(InputError, match=words):
        run(federation(seed=None, **fields), workdir=tmp_path / "run")


def test_a_start_that_ended_before_the_first_round_is_gone_on_with(federation, tmp_path):
    """Its evaluation is paid for, and so is not made again; and config.json, by which it was charged, may not change or go."""
    next(federation(seed=None).fit(small.shards(), tmp_path / "run"))
    path = tmp_path / "run" / "config.json"
    config = path.read_text()
    for damage, words in (
        (path.unlink, "config.json is gone"),
        (
            lambda: path.write_text(config.replace('"evaluations": 3', '"evaluations": 4')),
            "not the one that the ledger",
        ),
    ):
        damage()
        with pytest.raises(InputError, match=words):
            run(federation(seed=None), workdir=tmp_path / "run")
        path.write_text(config)
    run(federation(seed=None), workdir=tmp_path / "run")
    assert [(entry["round"], entry["attempt"]) for entry in entries(tmp_path / "run").evaluated] == [
        (0, 0),
        (2, 0),
        (4, 0),
    ]
