"""What clients keep back: drawn by their secrets alone, whole units, public numbers, and a noise that the budget pays for."""

import numpy as np
import pytest
import scipy.stats

from dplora_jax import config_checks
from dplora_jax.config import FIELDS
from dplora_jax.errors import InputError
from dplora_jax.federation import held_out, planning
from dplora_jax.privacy import accounting, host_noise
from tests.federation import small_federation as small

KEYS = [bytes([k]) * 32 for k in range(3)]


def config(**fields):
    return config_checks.settle(small.config(**({"private_test": 0.25} | fields)))


def split(shards=None, keys=KEYS, **fields):
    return held_out.split(config(**fields), shards or small.shards(), keys)


def test_each_record_trains_or_is_kept_back_and_none_does_both():
    training, held = split()
    for client, shard in enumerate(small.shards()):
        places = held.parts[client].places
        assert np.array_equal(shard["input_ids"][places], held.parts[client].rows["input_ids"])
        rest = np.setdiff1d(np.arange(small.SIZES[client]), places)
        assert np.array_equal(shard["input_ids"][rest], training[client]["input_ids"])
        assert set(training[client]) == set(shard)


def test_how_many_are_kept_back_follows_from_public_sizes():
    training, held = split()
    assert held.units == held_out.kept_back(config(), small.SIZES) == [5, 7, 3]
    assert [len(shard["labels"]) for shard in training] == held_out.training(config(), small.SIZES) == [15, 21, 9]


def test_which_are_kept_back_is_drawn_by_the_clients_secret_and_by_nothing_else():
    places = lambda **options: [part.places.tolist() for part in split(**options)[1].parts.values()]  # noqa: E731
    others = [small.rows(size, 50 + k) for k, size in enumerate(small.SIZES)]
    assert places() == places(shards=others) == places(epsilon=2.0, split_seed=9, rounds=7)
    changed = places(keys=[KEYS[0], b"x" * 32, KEYS[2]])
    assert changed[1] != places()[1]
    assert changed[::2] == places()[::2]


def test_every_record_is_kept_back_about_as_often():
    """Each of 20 in a quarter of 2,000 draws; false alarm below 1e-6, 20 times."""
    counts = np.zeros(20)
    for seed in range(2000):
        counts[held_out.drawn(np.arange(20), 5, seed.to_bytes(32, "big"))] += 1
    low, high = scipy.stats.binom.ppf([5e-8, 1 - 5e-8], 2000, 0.25)
    assert low <= counts.min()
    assert counts.max() <= high


def test_all_rows_of_a_unit_go_one_way():
    units = [np.arange(20) // 4, np.arange(28) % 14, np.array([7, 7, 7, 100, 100, 3, 3, 3, 3, 5, 5, 5])]
    shards = [shard | {"unit": unit.astype(np.int32)} for shard, unit in zip(small.shards(), units, strict=True)]
    training, held = split(shards, private_test=0.4, privacy_unit="column:who", unit_rows=2)
    assert held.units == [2, 6, 2]
    assert held.rows == [4, 12, 4], "a public number of rows is scored, whoever has how many"
    assert all((np.unique(part.units, return_counts=True)[1] <= 2).all() for part in held.parts.values())
    for client, part in held.parts.items():
        assert not set(part.units) & set(training[client]["unit"])
        assert set(part.units) | set(training[client]["unit"]) == set(units[client])
        assert "unit" not in part.rows, "rows of a person are records of their own"


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.01, "client 0's 20 records leaves none to be measured on"), (0.99, "leaves none to train on")],
)
def test_a_share_that_leaves_a_part_empty_is_one_sentence(share, words):
    for refused in (
        lambda: split(private_test=share),
        lambda: planning.plan(config(private_test=share), small.SIZES),
    ):
        with pytest.raises(InputError, match=words) as error:
            refused()
        assert str(error.value).count(". ") == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"trust": "client"}, "cannot be used with trust=client"),
        ({"eval_every": 0}, "needs `eval_every` above 0"),
        ({"epsilon": None, "noise_multiplier": 1.0}, "needs `private_test_epsilon` where `noise_multiplier`"),
        ({"private_test": 0.0, "private_test_epsilon": 2.0}, "`private_test_epsilon` needs `private_test`"),
        ({"private_test": 1.0}, r"private_test=1.0 must lie in \[0, 1\)"),
        ({"private_test_epsilon": -1.0}, "private_test_epsilon=-1.0 must"),
        ({"private_test_epsilon": 41.0}, "private_test_epsilon=41.0 must lie above 0, at most 40"),
    ],
)
def test_what_has_no_meaning_is_refused(fields, words):
    with pytest.raises(InputError, match=words):
        config(**fields)


@pytest.mark.parametrize("every", [1, 2, 3, 4, 7])
def test_a_run_is_evaluated_before_every_so_many_rounds_and_at_the_end(every):
    rounds = {0, *range(every, 5, every), 4}
    assert held_out.evaluations(config(eval_every=every)) == len(rounds)


@pytest.mark.parametrize(("count", "budget", "delta"), [(3, 8.0, 1e-3), (11, 1.0, 1e-5), (101, 4.0, 1e-6)])
def test_the_noise_is_what_the_exact_curve_of_the_gaussian_asks_for(count, budget, delta):
    """delta of `count` Gaussian mechanisms at epsilon (Balle and Wang 2018), a mechanism of sigma / sqrt(count)."""

    def exact(noise):
        mu = np.sqrt(count) / noise
        tails = scipy.stats.norm.cdf([mu / 2 - budget / mu, -mu / 2 - budget / mu])
        return tails[0] - np.exp(budget) * tails[1]

    fields = {"rounds": count - 1, "eval_every": 1, "private_test_epsilon": budget, "delta": delta}
    cost = held_out.cost(config(**fields), [5])
    assert cost.evaluations == count
    assert exact(cost.noise_multiplier) <= delta < exact(cost.noise_multiplier * 0.99)
    assert budget * 0.99 < cost.epsilon <= budget
    steps = accounting.Mechanism(1, 1.0, 1, cost.noise_multiplier)
    assert accounting.epsilon(steps, count, delta) == pytest.approx(cost.epsilon, rel=1e-3), "composed one by one"


def test_what_draws_lack_of_a_normal_stays_below_what_is_set_aside_for_rounding():
    most = FIELDS["private_test_epsilon"].metadata["most"]
    assert host_noise.excess_log2(2**46, most) < np.log2(accounting.ROUNDING / 100)


def test_the_budget_is_that_of_training_unless_another_is_given():
    assert config().private_test.epsilon == 8.0
    assert config(epsilon=100.0).private_test.epsilon == 40.0
    assert config(private_test_epsilon=3.0).private_test.epsilon == 3.0
    assert held_out.cost(config(private_test_epsilon=3.0), [5]).epsilon == pytest.approx(3.0, rel=1e-3)
    assert held_out.noise_multiplier(config(trust="none", epsilon=None)) == 0.0


def test_a_plan_shows_what_scores_cost_and_that_a_record_pays_once():
    plan = planning.plan(config(private_test_epsilon=9.0), small.SIZES)
    assert [client.records for client in plan.clients] == [15, 21, 9]
    assert plan.test.units == [5, 7, 3]
    assert plan.epsilon == plan.test.epsilon == pytest.approx(9.0, rel=1e-3)
    assert "15 more records are kept back and never train: 3 evaluations" in str(plan)
    assert planning.plan(config(private_test=0.0), small.SIZES).test is None
