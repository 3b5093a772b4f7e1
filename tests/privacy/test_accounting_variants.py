"""What adaptive clipping and correlated noise cost: closed forms, calibration, and what the ledger makes of them."""

import dataclasses

import numpy as np
import pytest

from dplora_jax.errors import InputError
from dplora_jax.privacy import accounting, ledger
from dplora_jax.privacy.accounting import Mechanism
from tests.privacy.test_accounting import DELTA, analytic_gaussian


def test_gradient_and_count_are_one_gaussian_of_the_joint_sensitivity():
    """A record moves (sum / clip_norm / sigma, count / sigma_b) by at most |(1 / sigma, 1/2 / sigma_b)| = 1 / z."""
    sigma, count = 4.0, 3.0
    z = accounting.joint_multiplier(sigma, count)
    assert 1 / z == pytest.approx(np.hypot(1 / sigma, 0.5 / count))
    exact = analytic_gaussian(z, DELTA)
    found = accounting.epsilon(Mechanism(50, 1.0, 50, sigma, count), 1, DELTA)
    assert exact - 1e-9 <= found <= exact + 2e-3
    assert found > accounting.epsilon(Mechanism(50, 1.0, 50, sigma), 1, DELTA) + 0.05


def test_adaptive_calibration_shares_the_budget_between_gradient_and_count():
    (plain,) = accounting.calibrate([775], 64, 20, 8.0, DELTA)
    for given, std in (None, 3.2), (1.0, 1.0):
        (found,) = accounting.calibrate([775], 64, 20, 8.0, DELTA, adaptive=True, count_noise=given)
        assert found.count_noise == pytest.approx(std)
        assert found.accounted_noise == pytest.approx(plain.noise_multiplier)
        assert found.noise_multiplier > plain.noise_multiplier
        assert 7.98 < accounting.epsilon(found, 20, DELTA) <= 8.0 + 1e-6
    (small,) = accounting.calibrate([100], 8, 20, 8.0, DELTA, adaptive=True)  # a twentieth of the batch would not do
    assert small.noise_multiplier == pytest.approx(small.accounted_noise / np.sqrt(1 - 1 / 9))
    (kept,) = accounting.with_noise([775], 64, 20, 0.9, DELTA, adaptive=True)
    assert (kept.noise_multiplier, kept.count_noise) == (0.9, 3.2)
    with pytest.raises(InputError, match=r"count_noise_multiplier=0\.1 alone spends the budget"):
        accounting.calibrate([775], 64, 20, 8.0, DELTA, adaptive=True, count_noise=0.1)


def test_correlated_noise_is_charged_once_a_turn_at_the_rate_of_a_part():
    step = Mechanism(62, 0.125, 16, 5.0, bands=4)
    assert (step.part, step.join_rate, [step.charged(t) for t in (1, 4, 5, 8)]) == (16, 0.5, [1, 1, 2, 2])
    same = Mechanism(16, 0.5, 16, 5.0)
    assert accounting.epsilon(step, 8, DELTA) == accounting.epsilon(same, 2, DELTA)
    cut = dataclasses.replace(step, capacity=9), dataclasses.replace(same, capacity=9)
    assert accounting.epsilon(cut[0], 8, DELTA) == accounting.epsilon(cut[1], 2, DELTA)
    assert accounting.epsilon(cut[0], 8, DELTA) > accounting.epsilon(step, 8, DELTA)
    everyone = Mechanism(100, 0.25, 25, 6.0, bands=4)  # a part joins whole: a Gaussian for every turn, and no sampling
    exact = analytic_gaussian(6.0 / np.sqrt(3), DELTA)
    assert exact - 1e-9 <= accounting.epsilon(everyone, 12, DELTA) <= exact + 2e-3
    parts = ((step, 4), (step, 8))
    assert accounting.composed(parts, DELTA) == pytest.approx(accounting.epsilon(same, 3, DELTA))


def test_parts_too_small_for_the_batch_are_refused():
    with pytest.raises(InputError, match="100 records have too small parts"):
        accounting.calibrate([100], 32, 8, 8.0, DELTA, bands=4)


def test_running_sums_carry_less_noise_at_the_same_budget():
    """1,000 records, expected batch 32, 20 rounds of 4 steps, epsilon 8: 0.75 of independent noise's mean squared error over
    all steps, in numpy alone."""
    steps, rounds = 4, 20
    (alone,) = accounting.calibrate([1000], 32, steps * rounds, 8.0, DELTA)
    (banded,) = accounting.calibrate([1000], 32, steps * rounds, 8.0, DELTA, bands=steps)
    assert accounting.epsilon(banded, steps * rounds, DELTA) <= 8.0
    coefficients = np.cumprod([1, 1 / 2, 3 / 4, 5 / 6])
    c = sum(x * np.eye(steps, k=-k) for k, x in enumerate(coefficients))
    inverse = np.linalg.inv(c / np.linalg.norm(c, axis=0))
    sums = np.tril(np.ones((steps * rounds, steps * rounds)))
    error = banded.noise_multiplier**2 * np.square(sums @ np.kron(np.eye(rounds), inverse)).sum(1).mean()
    assert error / (alone.noise_multiplier**2 * np.square(sums).sum(1).mean()) == pytest.approx(0.748, abs=0.01)


def test_the_ledger_keeps_every_field_of_a_mechanism(tmp_path):
    book = ledger.Ledger(tmp_path / "ledger.jsonl")
    mechanisms = [Mechanism(50, 0.5, 50, 4.0, count_noise=3.0), Mechanism(50, 0.25, 25, 4.0, bands=2)]
    book.begin((1, 4), 0, mechanisms, 2, {})
    again = ledger.Ledger(tmp_path / "ledger.jsonl").epsilons(DELTA)
    assert again == [accounting.epsilon(m, 6, DELTA) for m in mechanisms]
