"""A run whose noise is correlated over rounds goes on as it was, and after a loss begins anew and pays for it."""

import json

import jax
import numpy as np
import pytest

from dplora_jax import config_checks, losses
from dplora_jax.errors import InputError
from dplora_jax.federation import dispatch, silo_checks, storage
from dplora_jax.federation.federation import Federation
from dplora_jax.privacy import accounting
from dplora_jax.privacy.ledger import Ledger
from experiments import ledger as ledger_command
from tests.federation import small_federation as small

pytestmark = pytest.mark.usefixtures("quick_compile")
FIELDS = {"noise": "banded_rounds", "bands": 2, "expected_batch_size": 4.0, "rounds": 5, "eval_every": 0}


@pytest.fixture(scope="module")
def programs():
    """Compiled rounds, shared by the federations of this module that are of one shape."""
    return {}


@pytest.fixture
def federation(programs):
    def make(**fields):
        return Federation(*small.model(), losses.classification, small.config(**FIELDS | fields), programs=programs)

    return make


@pytest.fixture
def seen(monkeypatch):
    """The keys of each dispatch, of which none is run; at the one of this index the machine fails."""

    def watch(fails=None):
        calls = []

        def call(job, state, keys, length):
            calls.append(jax.tree.map(np.array, keys))
            if len(calls) - 1 == fails:
                raise KeyboardInterrupt
            return state, (None, None), 1.0

        monkeypatch.setattr(dispatch, "_call", call)
        return calls

    return watch


def run(made, workdir=None):
    return list(made.fit(small.shards(), workdir or storage.InMemory()))


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_run_that_was_killed_and_one_of_other_dispatches_release_the_same_bits(federation, tmp_path):
    whole, first, second, other = federation(), federation(), federation(), federation(dispatch_rounds=1)
    run(whole)
    for round in first.fit(small.shards(), tmp_path / "run"):
        if round.number == 2:
            break
    run(second, tmp_path / "run")
    same(whole.adapter, second.adapter)
    run(other)
    same(whole.adapter, other.adapter)


@pytest.mark.slow
def test_streamed_records_are_those_of_the_rounds_parts(federation):
    whole, streamed = federation(), federation(stream=True)
    run(whole)
    run(streamed)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), whole.adapter, streamed.adapter)


def test_a_start_between_dispatches_goes_on_with_the_keys_of_the_entries_before(federation, tmp_path, seen):
    calls = seen()
    for round in federation(seed=None).fit(small.shards(), tmp_path / "run"):
        if round.number == 2:
            break
    run(federation(seed=None), tmp_path / "run")
    first, second, third = (call["noise"] for call in calls)
    assert np.concatenate([x["place"][:, 0] for x in (first, second, third)]).tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(first["keys"][0, :, :2], third["keys"][0, :, :2])
    np.testing.assert_array_equal(second["keys"][0, :, :4], third["keys"][0, :, :4])
    assert len(np.unique(third["keys"][0].reshape(-1, 8), axis=0)) == 3 * 5  # clients and rounds
    book = Ledger(tmp_path / "run" / "privacy_ledger.jsonl", mend=False)
    assert book.epsilons(1e-3) == [accounting.epsilon(m, 5, 1e-3) for m in _mechanisms(book)]


def _mechanisms(book):
    from dplora_jax.privacy.ledger import rebuild

    return [rebuild(client) for client in book.begun[-1]["clients"]]


@pytest.mark.parametrize(
    ("dispatch_rounds", "begun"), [(2, [[1, 3], [3, 5], [3, 5]]), (3, [[1, 4], [1, 3]])], ids=["even", "odd"]
)
def test_after_a_loss_all_noise_is_new_and_turns_begin_anew_within_the_budget(
    federation, tmp_path, seen, dispatch_rounds, begun
):
    """Five rounds are three turns. Four rounds or three of a lost block are two of them, and the last turn has two rounds."""
    lost = seen(fails=len(begun) - 2)
    with pytest.raises(KeyboardInterrupt):
        run(federation(seed=None, dispatch_rounds=dispatch_rounds), tmp_path / "run")
    calls = seen()
    rounds = run(federation(seed=None, dispatch_rounds=dispatch_rounds), tmp_path / "run")
    assert rounds[-1].number == begun[-1][1] - 1
    assert max(rounds[-1].epsilon) <= 8
    (again,) = calls
    assert again["noise"]["place"][:, 0].tolist() == again["sampling"]["place"][:, 0].tolist() == [0, 1]
    block = again["noise"]["keys"][0]
    assert not block[:, 2:].any()
    assert not np.isin(block[:, :2], lost[-1]["noise"]["keys"][lost[-1]["noise"]["keys"] > 0]).any()
    book = Ledger(tmp_path / "run" / "privacy_ledger.jsonl", mend=False)
    assert [entry["rounds"] for entry in book.begun] == begun
    assert book.charged_steps(3) == [6] * 3


def test_with_noise_that_is_given_a_loss_makes_epsilon_larger_and_the_ledger_holds(federation, tmp_path, seen):
    """Three lost rounds are two turns, and the five of the next block three more: `verify` reckons so too, round by round."""
    given = {"seed": None, "epsilon": None, "noise_multiplier": 2.0, "dispatch_rounds": 3}
    seen(fails=0)
    with pytest.raises(KeyboardInterrupt):
        run(federation(**given), tmp_path / "run")
    seen()
    rounds = run(federation(**given), tmp_path / "run")
    book = Ledger(tmp_path / "run" / "privacy_ledger.jsonl", mend=False)
    assert book.charged_steps(3) == [4 + 5] * 3
    spent = {steps: [accounting.epsilon(m, steps, 1e-3) for m in _mechanisms(book)] for steps in (5, 6, 7, 9)}
    assert rounds[-1].epsilon == spent[9] == book.epsilons(1e-3)
    assert rounds[3].epsilon == spent[7]
    assert all(less < more for less, more in zip(spent[5], spent[9], strict=True))
    ledger_command.verify(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[3] |= {"epsilon": spent[6], "epsilon_max": max(spent[6])}  # as if lost rounds and new ones shared a turn
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match="less epsilon than was charged up to round 3"):
        ledger_command.verify(tmp_path / "run")


REFUSED = {
    "trust=distributed": ({"trust": "distributed"}, "cannot be used with trust=distributed"),
    "trust=client": ({"trust": "client"}, "cannot be used with trust=client"),
    "trust=none": ({"trust": "none", "epsilon": None}, "cannot be used with trust=none"),
    "local_steps": ({"local_steps": 2}, "takes one step in a round"),
    "adaptive clipping": ({"clipping": "adaptive"}, "exclude each other"),
    "no bands": ({"bands": None}, "needs `bands` of 2 or more"),
    "one band": ({"bands": 1}, "needs `bands` of 2 or more"),
    "more bands than rounds": ({"bands": 6}, "no more than rounds=5"),
    "participation": ({"participation": "fixed:2"}, "take back in vain"),
    "dropout": ({"dropout": 0.1}, "take back in vain"),
    "rolora": ({"aggregation": "rolora"}, "aggregation=rolora cannot be used"),
    "fedsa": ({"aggregation": "fedsa"}, "aggregation=fedsa cannot be used"),
    "a robust mean": ({"robust": "median"}, "robust=median cannot be used"),
    "rounded uploads": ({"upload_bits": 8}, "upload_bits=8 cannot be used"),
    "ranks": ({"ranks": (1, 2, 2)}, "cannot be used with noise=banded_rounds"),
    "another server": ({"server_optimizer": "adam", "server_momentum": 0.0}, "server_optimizer=adam cannot be used"),
    "another client": ({"client_optimizer": "adam"}, "client_optimizer=adam cannot be used"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_with_it_is_refused_by_name(name):
    fields, words = REFUSED[name]
    config_checks.settle(small.config(**FIELDS))
    with pytest.raises(InputError, match=words):
        config_checks.settle(small.config(**FIELDS | fields))


def test_parts_that_are_smaller_than_a_batch_are_refused(federation):
    with pytest.raises(InputError, match="bands=4 samples each step from one of as many parts"):
        federation(bands=4).plan(small.SIZES)


def test_silos_refuse_it():
    with pytest.raises(InputError, match="noise=banded_rounds takes each round once"):
        silo_checks.check(config_checks.settle(small.config(**FIELDS)))


def test_the_plan_and_config_json_say_what_the_noise_is(federation, tmp_path, seen):
    seen()
    plan = federation().plan(small.SIZES)
    made = accounting.calibrate(small.SIZES, 4.0, 5, 8.0, 1e-3, bands=2)
    assert [client.noise_multiplier for client in plan.clients] == [m.noise_multiplier for m in made]
    run(federation(), tmp_path / "run")
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    assert any("correlated over 2 rounds" in line for line in told["federation"]["method"])
    assert [client["bands"] for client in told["federation"]["clients"]] == [2] * 3
