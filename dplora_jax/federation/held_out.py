"""The records that clients keep back to be measured on: which, how many, and what their scores cost; no JAX.

Which records are kept back is drawn by each client's secret and depends on nothing else, so how many train and how many do not
is public, and each record pays for training or for its scores, never for both (PRIVACY.md, Scores on private records).
"""

import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np

from dplora_jax.config import FIELDS
from dplora_jax.data.records import UNIT
from dplora_jax.errors import InputError
from dplora_jax.federation import processes, trust
from dplora_jax.privacy import accounting, secrets

SPENT = "private_test_epsilon"  # in a line of metrics: what scores have cost a record that is kept back, so far


class Part(NamedTuple):
    """What one client keeps back: its rows {name: [R, ...]}, where they were among all its rows (int [R], rising), and the
    number of the unit that each belongs to (int [R]). The rows have `unit` too where a unit is one text in several rows."""

    rows: dict
    places: np.ndarray
    units: np.ndarray


class HeldOut(NamedTuple):
    """What is kept back: `parts` {client: Part} of the clients that this process trains for; `units` [K], how many units each of
    all clients keeps back, and `rows` [K], how many rows these may have at most, both public."""

    parts: dict
    units: list
    rows: list


class Cost(NamedTuple):
    """What the scores of a run will cost each unit that is kept back; `units` [K] are how many there are."""

    units: list
    evaluations: int
    noise_multiplier: float  # of the noise that a release carries, in units of what one unit can add
    epsilon: float


def checks(config, mode):
    """(holds, what to say if not) for a config whose defaults are filled in, under the trust mode `mode`."""
    share, epsilon = config.private_test.share, config.private_test.epsilon
    yield share or epsilon is None, "`private_test_epsilon` needs `private_test`: give that too, or leave it out."
    if not share:
        return
    yield (
        not mode.bare_clients,
        f"`private_test` cannot be used with trust={mode.name}, which protects whole clients: all records of one would move the "
        "counts together. Use a public test set, or trust=local.",
    )
    yield (
        not mode.private or epsilon is not None,
        "`private_test` needs `private_test_epsilon` where `noise_multiplier` is given in place of `epsilon`.",
    )
    yield (
        config.execution.eval_every > 0,
        "`private_test` needs `eval_every` above 0: with 0 nothing is ever evaluated.",
    )


def defaults(config):
    """{field: value} of what is not given: the budget of a unit that trains, since no unit is in both parts, as far as it is in
    range (beyond, what a draw lacks of a normal would count: PRIVACY.md)."""
    if not config.private_test.share or config.privacy.epsilon is None:
        return {}
    return {"private_test_epsilon": min(config.privacy.epsilon, FIELDS["private_test_epsilon"].metadata["most"])}


def evaluations(config):
    """How often a run is evaluated: the base model, every `eval_every` rounds, and after the last."""
    return 1 + -(-config.schedule.rounds // config.execution.eval_every)


def kept_back(config, sizes):
    """How many of each client's units are kept back, of `sizes` [K]: public. Raises InputError where a part is left empty."""
    return [_kept_back(config, size, client) for client, size in enumerate(sizes)]


def training(config, sizes):
    """How many of each client's units train, of `sizes` [K]: public. Raises InputError as `kept_back` does."""
    if not config.private_test.share:
        return list(sizes)
    return [size - count for size, count in zip(sizes, kept_back(config, sizes), strict=True)]


def _kept_back(config, size, client):
    count = round(config.private_test.share * size)
    if not 0 < count < size:
        raise InputError(
            f"private_test={config.private_test.share:g} of client {client}'s {size} {config.privacy.unit}s leaves none to "
            f"{'train on' if count else 'be measured on'}: give another share, or that client more."
        )
    return count


def split(config, shards, keys):
    """What trains and what is kept back of `shards` (see `Federation.fit`), by the clients' secrets `keys` -> (shards, HeldOut),
    or (shards as they are, None) where nothing is to be kept back.

    A client's rows may carry `unit` (int [n_k]), the number of the unit that each is of; all rows of a unit go one way. Without
    it each row is a unit. Of a unit that is kept back, at most `unit_rows` rows are scored, so that nothing follows how many it
    has. Raises InputError where a client is left without units of either kind.
    """
    if not config.private_test.share:
        return shards, None
    training, parts = list(shards), {}
    for client, shard in enumerate(shards):
        if shard is not None:
            units = units_of(shard)
            chosen = np.isin(units, drawn(units, _kept_back(config, len(np.unique(units)), client), keys[client]))
            training[client] = {name: array[~chosen] for name, array in shard.items()}
            chosen &= _some_rows(units, config.privacy.unit_rows, keys[client])
            rows = {n: array[chosen] for n, array in shard.items() if n != UNIT or not config.privacy.unit_column}
            parts[client] = Part(rows, np.flatnonzero(chosen), units[chosen])
    counts = processes.gather({client: len(np.unique(part.units)) for client, part in parts.items()})
    known = {int(client): count for one in counts for client, count in one.items()}
    kept = [known[client] for client in range(config.schedule.clients)]
    return training, HeldOut(parts, kept, [count * config.privacy.unit_rows for count in kept])


def units_of(shard):
    """The number of the unit that each row of a client's `shard` is of, int [n_k]; InputError where `unit` is another thing."""
    count = len(shard["attention_mask"])
    units = np.asarray(shard.get(UNIT, np.arange(count)))
    if units.shape != (count,) or units.dtype.kind not in "iu":
        raise InputError(f"`{UNIT}` must hold one whole number for each row, the number of its unit.")
    return units


def drawn(units, count, secret):
    """`count` of the numbers in `units`, uniformly at random by a client's `secret`: the same for the same secret, anywhere."""
    numbers = np.unique(units)
    words = hashlib.shake_256(secrets.digest(secret, "test split")).digest(8 * len(numbers))
    return numbers[np.argsort(np.frombuffer(words, "<u8"), kind="stable")[:count]]


def _some_rows(units, most, secret):
    """Whether each row, of the unit `units` [R], is among `most` of its unit's, drawn by a client's `secret`: bool [R]."""
    words = hashlib.shake_256(secrets.digest(secret, "test rows")).digest(8 * len(units))
    order = np.lexsort((np.frombuffer(words, "<u8"), units))
    chosen = np.zeros(len(units), bool)
    chosen[order] = np.arange(len(units)) - np.searchsorted(units[order], units[order]) < most
    return chosen


def cost(config, units):
    """The Cost of all evaluations of `config` (settled), where clients keep `units` [K] back."""
    count = evaluations(config)
    noise = noise_multiplier(config)
    return Cost(list(units), count, noise, accounting.full_epsilon([noise] * count, config.privacy.delta))


def noise_multiplier(config):
    """The noise of each evaluation: the least that keeps all of them within `private_test_epsilon`; 0 without privacy."""
    if not trust.mode(config).private:
        return 0.0
    one = _least_noise(config.private_test.epsilon, config.privacy.delta)
    return one * math.sqrt(evaluations(config))


@functools.cache
def _least_noise(budget, delta):
    """That of a single evaluation."""
    return accounting.least_noise(1, 1.0, 1, budget, delta)


def mechanism(noise):
    """An evaluation as the trust modes know a mechanism, whatever the number of units: every one of them takes part."""
    return accounting.Mechanism(1, 1.0, 1, noise)
