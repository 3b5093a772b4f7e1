"""What float64 may lose of delta is taken from it: no epsilon that is given lies below the exact one, however small delta is."""

import math

import mpmath
import numpy as np
import pytest

from dplora_jax.errors import InputError
from dplora_jax.privacy import accounting, auditing
from dplora_jax.privacy.accounting import Mechanism

FULL = [(sigma, steps) for sigma in (0.3, 1.0, 5.0, 20.0, 50.0) for steps in (1, 50, 1000, 10000)]


def exact_delta(mu, epsilon):
    """Of Gaussian steps whose total is `mu`, to 50 digits (Balle and Wang 2018, theorem 8)."""
    above = lambda x: mpmath.erfc(x / mpmath.sqrt(2)) / 2  # noqa: E731
    return above(epsilon / mu - mu / 2) - mpmath.exp(epsilon) * above(epsilon / mu + mu / 2)


def exceeds(sigma, steps, delta, epsilon):
    """Whether the exact epsilon at `delta` lies above `epsilon`."""
    with mpmath.workdps(50):
        return exact_delta(mpmath.sqrt(steps) / sigma, mpmath.mpf(epsilon)) > mpmath.mpf(delta)


@pytest.mark.parametrize("grid", [1e-3, 1e-2])
@pytest.mark.parametrize(("sigma", "steps"), [(s, n) for s, n in FULL if math.sqrt(n) / s < 15])
def test_no_accepted_epsilon_is_below_the_exact_one(sigma, steps, grid):
    """From the least delta that is accepted on. Without what is taken from delta, 3 % at 1e-14 and below 1e-11 in general."""
    least = accounting.least_delta(steps)
    for delta in {least, 1.5 * least, 10 * least, 1e-12, 1e-11, 1e-10, 1e-9, 1e-7, 1e-5} - {0}:
        found = accounting._after(Mechanism(100, 1.0, 100, sigma), steps, delta, grid)
        if delta < least:
            assert found == math.inf
        else:
            assert not exceeds(sigma, steps, delta, found * (1 + 1e-9))


def test_two_noises_composed_are_no_cheaper_than_the_exact_curve():
    parts, total = ((Mechanism(50, 1.0, 50, 4.0), 300), (Mechanism(50, 1.0, 50, 20.0), 600)), 300 / 16 + 600 / 400
    for delta in (accounting.least_delta(900), 1e-10, 1e-8):
        assert not exceeds(1 / math.sqrt(total), 1, delta, accounting.composed(parts, delta) * (1 + 1e-9))
    assert accounting.composed(parts, accounting.least_delta(900) * 0.99) == math.inf


def convolved(masses, count, offset):
    """`masses` convolved `count` times with themselves, in long double by squaring -> as many as `offset` says, from there on."""
    size = 1 << (len(masses) * count).bit_length()
    spectrum = np.fft.rfft(np.asarray(masses, np.longdouble), size)
    power = np.ones_like(spectrum)
    while count:
        power = power * spectrum if count % 2 else power
        spectrum, count = spectrum * spectrum, count // 2
    return np.fft.irfft(power, size)[offset:]


@pytest.mark.parametrize(
    "mechanism",
    [Mechanism(1000, 1.0, 1000, 20.0), Mechanism(1000, 0.2, 1000, 2.0), Mechanism(1000, 0.08, 110, 0.743)],
    ids=["full", "sampled", "truncated"],
)
def test_what_is_set_aside_covers_the_compositions_rounding_forty_times(mechanism):
    """Against the same masses composed in long double, whose rounding is two thousand times finer."""
    if np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("long double is no longer than double here")
    steps, grid = 200, 1e-2
    for one in (accounting.step_loss(mechanism, grid)._pmf_remove, accounting.step_loss(mechanism, grid)._pmf_add):
        one = one.to_dense_pmf()
        found = one.self_compose(steps)
        exact = convolved(one._probs, steps, found._lower_loss - steps * one._lower_loss)[: len(found._probs)]
        wrong = (np.asarray(found._probs, np.longdouble) - exact)[::-1]
        losses = (np.arange(len(wrong)) + found._lower_loss)[::-1] * np.longdouble(grid)
        tail = np.cumsum(wrong) - np.exp(losses) * np.cumsum(wrong * np.exp(-losses))  # of delta at each loss
        assert 0 < np.abs(tail[losses >= 0]).max() < accounting.ROUNDING * steps / 40


def test_a_delta_that_float64_does_not_hold_is_refused_in_one_sentence():
    for call in (
        lambda delta: accounting.calibrate((100,), 100, 1000, 8.0, delta),
        lambda delta: accounting.with_noise((100,), 100, 1000, 20.0, delta),
        lambda delta: accounting.least_noise(100, 1.0, 1000, 8.0, delta),
    ):
        with pytest.raises(
            InputError, match=r"delta=1e-12 is too small for 1000 private steps: .*; give 4e-11 or more"
        ):
            call(1e-12)
        call(4e-11)
    assert accounting.with_noise((100,), 10, 1000, 0.0, 1e-12)  # without noise there is nothing to account for


def test_an_audit_holds_rates_against_a_curve_that_rounding_took_nothing_from():
    mechanism = Mechanism(100, 1.0, 100, 50.0)
    plain = accounting.step_loss(mechanism, 1e-2).self_compose(100).get_delta_for_epsilon(list(auditing.LOSSES))
    np.testing.assert_allclose(auditing._curve(mechanism, 100), plain + 100 * accounting.ROUNDING, rtol=1e-12)
