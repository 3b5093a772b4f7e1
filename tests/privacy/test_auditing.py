"""The bounds against closed forms, and against mechanisms whose epsilon is known."""

import math

import numpy as np
import pytest
import scipy.stats

from dplora_jax.privacy import accounting, auditing
from dplora_jax.privacy.accounting import Mechanism

NORMAL = scipy.stats.norm
FULL = Mechanism(2, 1.0, 2, 4.0)
STEPS, DELTA = 4, 1e-5
APART = math.sqrt(STEPS) / FULL.noise_multiplier  # of in and out, in standard deviations


def test_all_guesses_right_prove_the_closed_form():
    """n right of n at significance a exclude every epsilon with (e^epsilon / (1 + e^epsilon))^n < a."""
    for n in 5, 23, 100:
        rate = 1e-3 ** (1 / n)
        assert auditing.one_run(n, n, n, 0, 1e-3) == pytest.approx(max(0, math.log(rate / (1 - rate))), abs=1e-5)


def test_guesses_prove_the_closed_form_with_mistakes_and_abstentions():
    for coins, guessed, right in (60, 40, 38), (500, 400, 300), (40, 40, 20):
        epsilon = auditing.one_run(coins, guessed, right, 0, 1e-3)
        tail = scipy.stats.binom.sf(right - 1, guessed, 1 / (1 + math.exp(-epsilon)))
        assert tail == pytest.approx(1e-3, rel=1e-3) if epsilon else tail > 1e-3


def test_delta_is_charged_for_every_coin():
    """Steinke et al. 2023, theorem 5.2: P(right >= v) <= beta + 2 m delta max_i (P(Binomial >= v - i) - beta) / i."""
    coins, guessed, right, delta = 300, 100, 97, 1e-5
    epsilon = auditing.one_run(coins, guessed, right, delta, 1e-3)
    tail = lambda least: scipy.stats.binom.sf(least - 1, guessed, 1 / (1 + math.exp(-epsilon)))  # noqa: E731
    charge = max((tail(right - i) - tail(right)) / i for i in range(1, right + 1))
    assert tail(right) + 2 * coins * delta * charge == pytest.approx(1e-3, rel=1e-3)
    assert epsilon < auditing.one_run(coins, guessed, right, 0, 1e-3)


def test_beating_a_claim_of_1_takes_23_of_23_and_no_guesses_pass_4_3():
    assert auditing.one_run(22, 22, 22, DELTA, 1e-3) < 1 < auditing.one_run(23, 23, 23, DELTA, 1e-3)
    least, highest = auditing.reach(DELTA)
    assert least == 23
    assert 4.25 < highest < 4.3
    assert auditing.one_run(8000, 8000, 8000, DELTA, 1e-3) < highest


def test_upper_rate_is_clopper_and_pearsons():
    assert auditing.upper_rate(0, 100, 0.01) == pytest.approx(1 - 0.01 ** (1 / 100))
    assert scipy.stats.binom.cdf(7, 50, auditing.upper_rate(7, 50, 0.01)) == pytest.approx(0.01)
    assert auditing.upper_rate(50, 50, 0.01) == 1


def test_exact_error_rates_prove_nearly_the_whole_claim_and_never_more():
    claim = accounting.epsilon(FULL, STEPS, DELTA)
    for threshold in 0.3, 0.5, 1.5:
        rates = NORMAL.sf(threshold * APART), NORMAL.cdf((threshold - 1) * APART)
        for pair in rates, rates[::-1]:
            assert 0.97 * claim < auditing.epsilon_from_rates(*pair, FULL, STEPS, DELTA) <= claim


def test_error_rates_beyond_the_curve_exceed_the_claim():
    claim = accounting.epsilon(FULL, STEPS, DELTA)
    rates = NORMAL.sf(0.55 * APART), NORMAL.sf(0.55 * APART)
    assert auditing.epsilon_from_rates(*rates, FULL, STEPS, DELTA) > claim
    assert auditing.epsilon_from_rates(0.5, 0.5, FULL, STEPS, DELTA) == 0


def test_bounds_of_a_mechanism_at_its_claim_fail_no_more_often_than_allowed():
    """25 attacks on the exact Gaussian mechanism at 90 % confidence: at most 2.5 in the mean, over 8 with probability 5e-4."""
    rng, claim, exceeded, reached = np.random.default_rng(0), accounting.epsilon(FULL, STEPS, DELTA), 0, []
    for _ in range(25):
        coins = rng.integers(0, 2, 1200).astype(bool)
        values = {name: rng.standard_normal(1200) for name in ("one", "two")}
        values = {"all": APART * coins + rng.standard_normal(1200)} | values
        bound = auditing.bound(values, coins, FULL, STEPS, DELTA, independent=True, confidence=0.9)
        exceeded += max(bound.guesses, bound.curve) > claim
        reached.append(bound.curve)
    assert exceeded <= 8
    assert np.median(reached) > 0.3 * claim


def test_coins_that_the_pilot_reveals_prove_nothing():
    rng = np.random.default_rng(6)
    coins = rng.integers(0, 2, 4000).astype(bool)
    revealed = np.arange(4000) % auditing.PILOT == 0
    values = {"all": np.where(revealed, 9.0 * coins, rng.standard_normal(4000))}
    bound = auditing.bound(values, coins, FULL, STEPS, DELTA, independent=True)
    assert bound.guesses == bound.curve == 0
    assert bound.coins == 3000


def test_two_bounds_two_rates_and_four_plans_share_the_significance():
    coins = np.arange(2000) // 4 % 2 == 0
    bound = auditing.bound({"all": 1.0 * coins}, coins, FULL, STEPS, DELTA, independent=True, confidence=0.99)
    assert bound.right == bound.guessed == 1500
    assert bound.false_positive == bound.false_negative == pytest.approx(1 - (0.01 / 4) ** (1 / 750))
    assert bound.guesses == pytest.approx(auditing.one_run(1500, 1500, 1500, DELTA, 0.01 / 8))


def test_coins_that_are_no_independent_trials_have_no_curve():
    coins = np.arange(100) % 2 == 0
    assert auditing.bound({"all": 1.0 * coins}, coins, FULL, STEPS, DELTA, independent=False).curve is None


def test_more_noise_is_never_mistaken_for_less():
    rates = 0.2, 0.3
    bounds = [
        auditing.epsilon_from_rates(*rates, Mechanism(2, 1.0, 2, sigma), STEPS, DELTA) for sigma in (0.5, 2.0, 8.0)
    ]
    assert bounds == pytest.approx([bounds[0]] * 3, rel=0.03)  # what is proven does not depend on what is claimed


def one_round(canaries, coins, sigma, rng, joined=None):
    """Noisy sums of one round, each client with the same canaries [C, D] -> arguments of `auditing.scores`."""
    present = coins if joined is None else coins & joined
    sums = present @ canaries + sigma * rng.standard_normal((len(coins), canaries.shape[1]))
    return {"w": sums[None]}, {"w": canaries[None]}


def test_score_of_one_canary_is_the_likelihood_ratio():
    rng = np.random.default_rng(1)
    canary = np.array([[0.6, 0.8]])
    coins = rng.integers(0, 2, (50, 1)).astype(bool)
    sums, canaries = one_round(canary, coins, 0.7, rng)
    for rate in 1.0, 0.3:
        found = auditing.scores(sums, canaries, np.full(50, 0.7), rate)["all"]
        seen = sums["w"][0] @ canary[0]
        ratio = np.log(1 - rate + rate * np.exp(NORMAL.logpdf(seen, 1, 0.7) - NORMAL.logpdf(seen, 0, 0.7)))
        np.testing.assert_allclose(found[:, 0], ratio, rtol=1e-9)


def test_canaries_that_point_alike_are_still_told_apart():
    """Two canaries 10 degrees apart, noise of a fiftieth: the projection on each mixes both, the filter does not."""
    rng = np.random.default_rng(2)
    angle = np.deg2rad(10)
    canary = np.array([[1, 0], [np.cos(angle), np.sin(angle)]])
    coins = rng.integers(0, 2, (400, 2)).astype(bool)
    sums, canaries = one_round(canary, coins, 0.02, rng)
    found = auditing.scores(sums, canaries, np.full(400, 0.02), 1.0)["all"]
    assert ((found > 0) == coins).mean() > 0.99
    assert (((sums["w"][0] @ canary.T) > 0.5) == coins).mean() < 0.9


def test_scores_of_differences_lose_what_clients_and_rounds_share():
    rng = np.random.default_rng(3)
    coins = rng.integers(0, 2, (40, 1)).astype(bool)
    drift = np.array([[[1.0, 0.0]], [[0.8, 0.6]]])  # the canary's gradient in two rounds
    clean = coins[None] @ drift
    same_clients = {"w": clean + 30 * rng.standard_normal((2, 1, 2))}
    same_rounds = {"w": clean + 30 * rng.standard_normal((1, 40, 2))}
    for name, sums in ("clients", same_clients), ("rounds", same_rounds):
        found = auditing.scores(sums, {"w": drift}, np.full(40, 30.0), 1.0)[name][:, 0]
        assert found[coins[:, 0]].min() > found[~coins[:, 0]].max(), name


def test_a_leaf_without_noise_has_a_score_of_its_own():
    rng = np.random.default_rng(4)
    coins = rng.integers(0, 2, (40, 1)).astype(bool)
    canaries = {"a": np.full((1, 1, 2), 0.7), "b": np.full((1, 1, 2), 0.01)}
    sums = {name: coins @ x for name, x in canaries.items()} | {"a": 9 * rng.standard_normal((1, 40, 2))}
    found = auditing.scores(sums, canaries, np.full(40, 9.0), 1.0)["b"][:, 0]
    assert found[coins[:, 0]].min() > found[~coins[:, 0]].max()
