"""The federation as an object: what it plans is what it spends, and it goes on where it was."""

import collections
import json

import jax
import numpy as np
import pytest

from dplora_jax import evaluation, losses, peft
from dplora_jax.errors import InputError, InputWarning
from dplora_jax.federation import dispatch, storage
from dplora_jax.federation.federation import Federation
from dplora_jax.privacy import accounting, secrets
from dplora_jax.privacy.ledger import Ledger
from tests.federation import small_federation as small

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def programs():
    """Compiled rounds, shared by the federations of this module that are of one shape."""
    return {}


@pytest.fixture
def federation(programs):
    return lambda **fields: Federation(*small.model(), losses.classification, small.config(**fields), programs=programs)


def run(federation, workdir=None, **options):
    """All rounds of `federation`."""
    return list(federation.fit(small.shards(), workdir or storage.InMemory(), **options))


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_plan_is_what_the_rounds_spend(federation):
    made = federation()
    plan = made.plan(small.SIZES)
    last = run(made)[-1]
    assert last.number == 4
    assert last.epsilon == pytest.approx([client.epsilon for client in plan.clients], rel=1e-6)
    assert all(7.9 < client.epsilon <= 8 for client in plan.clients)
    assert "sigma" in str(plan)


def test_epsilon_grows_from_zero_round_by_round(federation):
    rounds = run(federation())
    spent = [max(round.epsilon) for round in rounds]
    assert [round.number for round in rounds] == [0, 1, 2, 3, 4]
    assert spent[0] == 0
    assert spent == sorted(spent)


def test_metrics_are_those_of_the_public_rows_every_so_many_rounds(federation):
    rounds = run(federation(), evaluate=evaluation.on(small.test_rows()))
    assert [round.number for round in rounds if "accuracy" in round.metrics] == [0, 2, 4]
    assert all(0 <= round.metrics["macro_f1"] <= 1 for round in rounds if round.metrics)


def test_a_run_in_memory_is_the_run_in_a_workdir(federation, tmp_path):
    """One way through: the same keys, the same charges, the same adapter."""
    memory, kept = federation(), federation()
    run(memory)
    run(kept, tmp_path / "run")
    same(memory.adapter, kept.adapter)
    assert Ledger(tmp_path / "run" / "privacy_ledger.jsonl").ended
    assert not (tmp_path / "run" / "private" / secrets.FILE).exists()
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()


def test_a_run_without_a_workdir_says_that_nothing_is_durable(federation):
    with pytest.warns(InputWarning, match="nothing of this run is durable"):
        next(federation().fit(small.shards()))


def test_a_run_that_was_left_goes_on_where_it_was(federation, tmp_path):
    whole, first, second = federation(), federation(), federation()
    run(whole)
    for round in first.fit(small.shards(), tmp_path / "run"):
        if round.number == 2:
            break  # the generator is closed: the workdir is free again
    rounds = run(second, tmp_path / "run")
    assert [round.number for round in rounds] == [0, 1, 2, 3, 4]
    same(whole.adapter, second.adapter)
    assert Ledger(tmp_path / "run" / "privacy_ledger.jsonl").charged_rounds() == 4


def test_a_run_stops_between_dispatches_when_it_is_asked_to(federation, tmp_path):
    asked = []
    made = federation()
    for round in made.fit(small.shards(), tmp_path / "run", stop=lambda: bool(asked)):
        asked.extend([True] if round.number == 1 else [])
    assert made.stopped
    assert made.history[-1]["round"] == 2
    assert not Ledger(tmp_path / "run" / "privacy_ledger.jsonl").ended
    with pytest.raises(InputError, match=r"to its end first|there is no adapter"):
        made.save(tmp_path / "adapter")


def test_a_finished_workdir_shows_its_rounds_and_charges_nothing(federation, tmp_path):
    run(federation(), tmp_path / "run")
    before = (tmp_path / "run" / "privacy_ledger.jsonl").read_text()
    again = run(federation(), tmp_path / "run")
    assert [round.number for round in again] == [0, 1, 2, 3, 4]
    assert (tmp_path / "run" / "privacy_ledger.jsonl").read_text() == before


def test_a_dispatch_is_charged_before_it_runs(federation, tmp_path, monkeypatch):
    """A crash inside the program leaves the charge; the next start pays again, and draws other noise."""
    made = federation(seed=None)

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(dispatch, "_call", crash)
        with pytest.raises(KeyboardInterrupt):
            run(made, tmp_path / "run")
    ledger = Ledger(tmp_path / "run" / "privacy_ledger.jsonl")
    assert ledger.charged_rounds() == 2
    assert ledger.open_entry()
    rounds = run(federation(seed=None), tmp_path / "run")
    assert rounds[-1].number == 2, "two of four rounds were paid for in vain: the budget ends early"
    assert Ledger(tmp_path / "run" / "privacy_ledger.jsonl").charged_rounds() == 4
    assert max(rounds[-1].epsilon) <= 8


def test_a_dispatch_is_charged_run_saved_and_committed_and_only_then_shown(federation, monkeypatch):
    """Whatever is killed in between: no round runs unpaid, and no metric is out whose round could run again."""
    kept, events = storage.InMemory(), []

    def listen(target, name):
        real = getattr(target, name)
        monkeypatch.setattr(target, name, lambda *args, **more: (events.append(name), real(*args, **more))[1])

    for target, name in (
        (kept.ledger, "begin"), (dispatch, "_call"), (kept, "save"), (kept.ledger, "commit"), (kept, "release"),
    ):  # fmt: skip
        listen(target, name)
    for round in federation().fit(small.shards(), kept):
        events.append(round.number)
    paid = ["begin", "_call", "save", "commit", "release"]
    assert events == ["save", "release", 0, *paid, 1, 2, *paid, 3, 4, "release"]


def test_in_memory_too_no_client_goes_past_its_epsilon(federation, monkeypatch):
    """The ledger in memory refuses as the one on disk does."""
    monkeypatch.setattr(dispatch.budgets, "affordable", lambda job, done: 10**6)
    monkeypatch.setattr(accounting, "calibrate", accounting_that_plans_too_little_noise(accounting.calibrate))
    with pytest.raises(InputError, match="would take a client to epsilon"):
        run(federation())


def accounting_that_plans_too_little_noise(calibrate):
    import dataclasses

    def loud(*args, **options):
        return [dataclasses.replace(m, noise_multiplier=m.noise_multiplier / 4) for m in calibrate(*args, **options)]

    return loud


def test_secrets_in_memory_are_new_in_each_run(federation):
    one, other = federation(seed=None), federation(seed=None)
    run(one)
    run(other)
    leaves = zip(jax.tree.leaves(one.adapter["head"]), jax.tree.leaves(other.adapter["head"]), strict=True)
    assert not any(np.array_equal(x, y) for x, y in leaves)


def test_the_saved_adapter_is_the_released_one(federation, tmp_path):
    made = federation()
    run(made)
    made.save(tmp_path / "adapter")
    loaded, _ = peft.load(tmp_path / "adapter", *small.model())
    same(jax.tree.map(np.asarray, loaded["layers"]), made.adapter["layers"])


def test_config_json_says_every_field_and_what_the_run_made_of_it(federation, tmp_path):
    run(federation(), tmp_path / "run")
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (told["rank"], told["epsilon"], told["targets"]) == (2, 8.0, "q,v")
    assert [client["records"] for client in told["federation"]["clients"]] == small.SIZES


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"epsilon": None}, "trust=local needs `epsilon`"),
        ({"rounds": "4"}, "rounds='4' must be a whole number"),
        ({"clip_norm": float("inf")}, "clip_norm=inf clips nothing"),
        ({"noise": "banded", "trust": "none", "epsilon": None}, "noise=banded cannot be used with trust=none"),
        ({"aggregation": "fedex", "freeze_a": True, "ema": 0.0}, "exact already"),
    ],
)
def test_a_mistake_is_a_sentence_about_fields(federation, fields, words):
    with pytest.raises(InputError) as error:
        federation(**fields)
    assert words in str(error.value)
    assert "--" not in str(error.value)


def test_other_records_than_the_workdirs_are_refused(federation, tmp_path):
    for round in federation().fit(small.shards(), tmp_path / "run"):
        if round.number == 2:
            break
    changed = small.shards()
    changed[1]["labels"] = changed[1]["labels"][::-1].copy()
    with pytest.raises(InputError, match="the records are not those"):
        collections.deque(federation().fit(changed, tmp_path / "run"), maxlen=0)
    assert Ledger(tmp_path / "run" / "privacy_ledger.jsonl").charged_rounds() == 2


def test_the_number_of_shards_is_the_number_of_clients(federation):
    with pytest.raises(InputError, match="records of 2 clients are given, and clients=3"):
        list(federation().fit(small.shards()[:2], storage.InMemory()))


def test_a_workdir_that_was_opened_for_another_run_is_refused(federation, tmp_path):
    made = federation()
    with (
        storage.open_workdir(tmp_path / "run", made.config) as opened,
        pytest.raises(InputError, match="another `clip_norm`"),
    ):
        next(federation(clip_norm=9.0).fit(small.shards(), opened))


def test_config_json_may_not_change_between_dispatches(federation, tmp_path):
    rounds = federation().fit(small.shards(), tmp_path / "run")
    for _ in range(3):
        next(rounds)  # 0, 1 and 2
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"clip_norm": 1.0', '"clip_norm": 9.0'))
    with pytest.raises(InputError, match="another than the ledger was charged by"):
        next(rounds)
    assert Ledger(tmp_path / "run" / "privacy_ledger.jsonl").charged_rounds() == 2


def test_the_adapter_can_be_measured_after_each_round(federation):
    measure = evaluation.on(small.test_rows())
    made = federation()
    for _ in made.fit(small.shards(), storage.InMemory()):
        assert 0 <= made.evaluate(measure)["accuracy"] <= 1


def test_an_abandoned_fit_leaves_nothing_to_save(federation, tmp_path):
    made = federation()
    run(made)
    next(made.fit(small.shards(), storage.InMemory()))
    with pytest.raises(InputError, match="there is no adapter here"):
        made.save(tmp_path / "adapter")


def test_documents_are_written_before_the_run_has_ended(federation, tmp_path):
    """A kill between the adapter and the end of the ledger costs no document: the next start writes them."""

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(federation(), tmp_path / "run", closing=killed)
    ledger = tmp_path / "run" / "privacy_ledger.jsonl"
    assert not Ledger(ledger).ended
    ended_at = []
    run(federation(), tmp_path / "run", closing=lambda: ended_at.append(Ledger(ledger, mend=False).ended))
    assert ended_at == [False]
    assert Ledger(ledger).ended
