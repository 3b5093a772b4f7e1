"""An attack that tries to prove the accounting wrong: canaries in or out by fair coins, and a lower bound on epsilon.

Letters: K clients, C canaries of a client, R rounds, D coordinates of a leaf, M coins (clients x canaries x runs).

What is given is what the adversary sees and knows: uploads, canaries and mechanisms. Confidence is over the mechanism's
randomness and the coins. Bounds: Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846) by `jax_privacy.auditing`, and the
accounted trade-off curve itself (as Nasr et al. 2023, arXiv 2302.07956, do with the Gaussian's).
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
import scipy.special
import scipy.stats

from dplora_jax.privacy import accounting

CONFIDENCE = 0.999
PILOT = 4  # every 4th coin is revealed to the adversary, who picks a score and a threshold by it; the others decide
MARGIN = 10  # standard errors, about four: what another score must be better by
FEW = 800  # coins: about as many as guesses profit from at delta 1e-5, which is charged for every coin
PLANS = ((None, 1.0), (None, 0.2), (FEW, 1.0), (FEW, 0.2))  # how many coins are played for, the share guessed
LOSSES = np.arange(0, 30, 0.02)  # at which the trade-off curve is compared
NOISE_FACTORS = (1 / 64, 64)  # of the claimed noise, between which the noise that the attack excludes is sought


class Bound(NamedTuple):
    """A lower bound on epsilon and what it rests on. `guesses` holds for any mechanism whatever; `curve` is the epsilon of the
    accounted mechanism with as much noise as the attack's error rates still allow, None where coins are not one a client. It
    supposes that clients' randomness is independent."""

    guesses: float
    curve: float | None
    score: str
    coins: int
    guessed: int
    right: int
    false_positive: float
    false_negative: float


def scores(sums, canaries, sigmas, rate, steps=1):
    """What a transcript says of each canary, more where it is likelier in -> {name: [K, C] float64}.

    `sums` {leaf: [R, K, D]} are the noisy sums of each client and round as recovered from its upload, `canaries`
    {leaf: [R, C, D]} the clipped gradients that a canary adds at that round's adapter, both in units of the clipping norm.
    `sigmas` [K] are noise multipliers, `rate` is how likely a record joins a step, `steps` how many steps a round sums.

    "all" is the likelihood ratio under the mechanism as claimed; one for each leaf alone finds noise that is missing there;
    "clients" and "rounds" take the mean over clients and rounds away, and with it whatever noise they share.
    """
    sums = {name: np.nan_to_num(np.asarray(x, np.float64)) for name, x in sums.items()}
    canaries = {name: np.nan_to_num(np.asarray(x, np.float64)) for name, x in canaries.items()}
    sigmas = np.asarray(sigmas, np.float64)
    ratio = functools.partial(_likelihood_ratio, sigmas=sigmas, rate=rate, steps=steps)
    by_score = {"all": ratio(sums, canaries)}
    for name in sums if len(sums) > 1 else ():
        by_score[name] = ratio({name: sums[name]}, {name: canaries[name]})
    rounds, clients = next(iter(sums.values())).shape[:2]
    if clients > 1:
        unit = sigmas[:, None] if (sigmas > 0).all() else 1.0
        shared = {name: unit * (x / unit).mean(1, keepdims=True) for name, x in sums.items()}
        by_score["clients"] = ratio({name: x - shared[name] for name, x in sums.items()}, canaries)
    if rounds > 1:
        by_score["rounds"] = _between_rounds(sums, canaries, rate)
    return by_score


def _products(x, y):
    """Inner products over all leaves: {leaf: [R, K, D]}, {leaf: [R, C, D]} -> [R, K, C]."""
    return sum(np.einsum("rkd,rcd->rkc", x[name], y[name]) for name in x)


def _likelihood_ratio(sums, canaries, sigmas, rate, steps):
    """log P(transcript | in) / P(transcript | out), each canary told from the others by the best linear filter.

    A round shows a_i b_i M e_i + N(0, sigma^2 M) on the canaries, with M their Gram matrix; p is the variance of a_j b_j.
    """
    gram, seen = _products(canaries, canaries), _products(sums, canaries)
    rounds, count = gram.shape[:2]
    total, variance = np.zeros(seen.shape[1:]), rate / 2 * (1 - rate / 2)
    for sigma in np.unique(sigmas):
        mine = sigmas == sigma
        noise = max(sigma, 1e-3) ** 2 * steps
        for r in range(rounds):
            filters = np.linalg.inv(steps * variance * gram[r] + noise * np.eye(count))  # [C, C], a filter a column
            reply = gram[r] @ filters  # [j, i]: what canary j leaves in the filter of i
            signal = np.diag(reply)
            if not (signal > 1e-12).all():
                continue
            others = reply - np.diag(signal)
            estimate = (seen[r][mine] @ filters - steps * rate / 2 * others.sum(0)) / (signal * steps)
            spread = noise * np.einsum("ji,jk,ki->i", filters, gram[r], filters) + variance * (others**2).sum(0)
            exponent = (estimate - 0.5) / (spread / (signal * steps) ** 2)
            if steps == 1 and rate < 1:
                exponent = np.logaddexp(np.log1p(-rate), np.log(rate) + exponent)
            total[mine] += exponent
    return total


def _between_rounds(sums, canaries, rate):
    """What moves with a canary from round to round: along its change where it is in every round, else how much moves."""
    moved = {name: x - x.mean(0) for name, x in sums.items()}
    if rate == 1:
        return _products(moved, {name: x - x.mean(0) for name, x in canaries.items()}).sum(0)
    return (_products(moved, canaries) ** 2).sum(0)


def bound(scores, coins, mechanism, steps, delta, independent, confidence=CONFIDENCE):
    """The lower bound on epsilon that `scores` {name: [M]} proves of the `coins` [M] (True = in) -> Bound.

    `mechanism` and `steps` are the claim of the clients that hold the canaries (None where they differ). `independent`: each
    client holds one canary, so that coins are independent trials, if clients' randomness is, and the trade-off curve applies.
    Each of the two bounds fails with probability at most (1 - confidence) / 2, so that both hold together with `confidence`.
    """
    coins = np.asarray(coins, bool)
    pilot = np.arange(len(coins)) % PILOT == 0
    alpha = (1 - confidence) / 2
    name, threshold = _picked(scores, coins, pilot, alpha)
    values, truth = np.asarray(scores[name])[~pilot], coins[~pilot]
    guesses, guessed, right = _from_guesses(values - threshold, truth, delta, alpha)
    wrong_in, wrong_out = (values[~truth] > threshold).sum(), (values[truth] <= threshold).sum()
    false_positive = upper_rate(wrong_in, (~truth).sum(), alpha / 2)
    false_negative = upper_rate(wrong_out, truth.sum(), alpha / 2)
    curve = None
    if independent and mechanism is not None:
        curve = epsilon_from_rates(false_positive, false_negative, mechanism, steps, delta)
    return Bound(guesses, curve, name, len(truth), guessed, right, float(false_positive), float(false_negative))


def _picked(scores, coins, pilot, alpha):
    """The score and the threshold that promise most, going by the pilot's coins -> (name, threshold).

    The promise is how many standard deviations apart the rest would then be proven to be. "all" is the best score of an
    intact mechanism, and gives way only to a score that is better beyond chance.
    """
    truth = coins[pilot]
    ins, outs = truth.sum(), (~truth).sum()
    best = -np.inf, "all", 0.0
    for name, values in scores.items():
        order = np.argsort(values[pilot], kind="stable")
        ordered, hits = np.asarray(values[pilot], np.float64)[order], truth[order]
        missed, raised = (
            np.cumsum(hits)[:-1],
            outs - np.cumsum(~hits)[:-1],
        )  # by a threshold after each value but the last
        rates = [upper_rate((PILOT - 1) * e, (PILOT - 1) * n, alpha / 2) for e, n in ((raised, outs), (missed, ins))]
        apart = scipy.stats.norm.isf(rates[0]) - scipy.stats.norm.ppf(rates[1])
        index = int(np.argmax(apart))
        promise = apart[index] - (0 if name == "all" else MARGIN / np.sqrt(len(truth)))
        if promise > best[0]:
            best = promise, name, (ordered[index] + ordered[index + 1]) / 2
    return best[1:]


def _from_guesses(margins, truth, delta, alpha):
    """The largest bound over `PLANS`, which share alpha -> (epsilon, how many coins were guessed, how many right)."""
    best = 0.0, 0, 0
    for count, share in PLANS:
        mine, coins = margins[:count], truth[:count]
        sure = np.argsort(-np.abs(mine), kind="stable")[: int(np.ceil(share * len(coins)))]
        right = int(((mine > 0) == coins)[sure].sum())
        best = max(best, (one_run(len(coins), len(sure), right, delta, alpha / len(PLANS)), len(sure), right))
    return best


def one_run(coins, guessed, right, delta, alpha):
    """The epsilon that `right` of `guessed` guesses, of `coins` fair coins, exclude at significance `alpha`.

    The adversary may guess in and out alike, and abstain; `jax_privacy` counts guesses of one side, so that right guesses
    stand for its held-in canaries and all others for its held-out ones. The threshold is explicit: its own choice of one
    corrects for the convex hull's corners only, which depend on the data.

    >>> round(one_run(23, 23, 23, 0, 1e-3), 3), round(one_run(22, 22, 22, 0, 1e-3), 3)
    (1.049, 0.997)
    """
    from jax_privacy import auditing  # takes seconds to import

    if not right:
        return 0.0
    others = np.repeat([1.0, 0.0], [guessed - right, max(coins - guessed, int(guessed == right))])
    auditor = auditing.CanaryScoreAuditor(np.ones(right), others)
    delta = max(delta, np.finfo(float).tiny)
    return float(auditor.epsilon_one_run(alpha, delta, threshold_strategy=auditing.Explicit(0.5)))


def upper_rate(errors, trials, alpha):
    """Clopper and Pearson's upper bound on a rate, from `errors` (a number or an array) in `trials`."""
    errors = np.asarray(errors)
    return np.where(
        errors >= trials, 1.0, scipy.special.betaincinv(errors + 1, np.maximum(trials - errors, 1), 1 - alpha)
    )


def epsilon_from_rates(false_positive, false_negative, mechanism, steps, delta):
    """The epsilon of `mechanism` with the most noise, in place of its own, whose curve error rates this low do not contradict.

    With less noise than claimed, it exceeds the claim; then the claimed curve itself is contradicted, by some (epsilon', delta')
    on it. That verdict supposes nothing of the mechanism's form, but that the trials behind the rates are independent, as they
    are where each client draws randomness of its own: clients that share it may each keep the curve and still err all together.
    """

    def at(factor):
        return dataclasses.replace(mechanism, noise_multiplier=mechanism.noise_multiplier * factor)

    def contradicted(factor):
        deltas = np.asarray(_curve(at(factor), steps))
        pairs = (false_positive, false_negative), (false_negative, false_positive)
        return any((1 - y > np.exp(LOSSES) * x + deltas).any() for x, y in pairs)

    low, high = NOISE_FACTORS
    if false_positive + false_negative >= 1 or not contradicted(high):
        return 0.0
    low = 1.0
    while low > NOISE_FACTORS[0] and contradicted(low):
        low, high = low / 2, low
    while high / low > 1.015:
        middle = np.sqrt(low * high)
        low, high = (low, middle) if contradicted(middle) else (middle, high)
    return accounting.epsilon(at(high), steps, delta, accounting.GRID if high > 0.5 else 1e-2)


@functools.lru_cache(maxsize=256)
def _curve(mechanism, steps):
    """delta of the composed mechanism at each of `LOSSES`: an upper bound."""
    deltas = accounting.step_loss(mechanism, 1e-2).self_compose(steps).get_delta_for_epsilon(list(LOSSES))
    return tuple(deltas + accounting.ROUNDING * steps)


def reach(delta, confidence=CONFIDENCE):
    """The most that guesses can prove -> (how many right guesses of as many beat a claim of 1, None where none do, and the
    highest bound at `delta`). More guesses reach no further: each coin is charged delta."""
    alpha = 1 - confidence
    least = next((n for n in range(1, 100) if one_run(n, n, n, delta, alpha) > 1), None)
    counts = np.unique(np.geomspace(10, 1e4, 50).astype(int))
    return least, max(one_run(n, n, n, delta, alpha) for n in counts)
