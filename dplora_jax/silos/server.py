"""The server's part of a round in NumPy: sum, and step. It is what `federation.round.server_step` does to the flat adapter.

Letters: K sites, D numbers of the adapter.
"""

from typing import NamedTuple

import numpy as np

from dplora_jax.errors import InputError
from dplora_jax.federation import trust
from dplora_jax.silos import masks

B1, B2, TAU = np.float32(0.9), np.float32(0.99), np.float32(1e-3)  # as in `federation.program.MOMENTS`
YOGI_START = 1e-6


class State(NamedTuple):
    """What one round hands to the next, float32 [D]: the adapter, the average of released ones, the optimizer's moments; and how
    many rounds counted."""

    adapter: np.ndarray
    mean: np.ndarray
    first: np.ndarray
    second: np.ndarray
    rounds: int


class Server:
    """Sums and steps for a `config` that silos can run (`check`); `sizes` and `mechanisms` are the sites', and the first `head`
    numbers of the adapter are the classification head's. `bits` is the grid of masked integers (`integers.bits_for`)."""

    def __init__(self, config, sizes, mechanisms, head, bits=None):
        check(config)
        self.config, self.mode, self.head = config, trust.mode(config), head
        self.weights = np.array(self.mode.weights(config, sizes, mechanisms), np.float32)
        self.divisor = np.float32(sum(self.mode.expected(config, sizes, mechanisms)))
        self.unit = None if bits is None else np.float32(config.privacy.clip_norm * 2.0**-bits)

    def init(self, adapter):
        """The State before round 1."""
        start = YOGI_START if self.config.aggregation.server_optimizer == "yogi" else 0
        moments = (np.full(len(adapter), start, np.float32) for _ in range(2))
        return State(adapter, adapter.copy(), *moments, 0)

    def released(self, state):
        """The adapter to release: the running average where `ema` asks for one."""
        return state.mean if self.config.aggregation.ema else state.adapter

    def step(self, state, uploads):
        """The State after a round of `uploads` {site: float32 [D], or masked uint32 [D]}; as it was where none counts. The
        sum is in the sites' order, whatever the order of arrival."""
        mean = self._masked_mean(uploads) if self.mode.masked else self._mean(uploads)
        return state if mean is None else self._stepped(state, mean)

    def total(self, uploads):
        """The integer total of the masked uploads of all peers: int32 [D]."""
        return masks.total([uploads[site] for site in sorted(uploads)])

    def _mean(self, uploads):
        """The weighted mean of uploads that are finite."""
        whole = [site for site in sorted(uploads) if np.isfinite(uploads[site]).all()]
        if not whole:
            return None
        total, weight = np.zeros_like(uploads[whole[0]]), np.float32(0)
        for site in whole:
            total, weight = total + self.weights[site] * uploads[site], weight + self.weights[site]
        return total / weight

    def _masked_mean(self, uploads):
        """A client's step on the total over all expected batches."""
        if len(uploads) < self.config.privacy.survivors:
            return None
        gradient = self.unit * self.total(uploads).astype(np.float32) / self.divisor
        optimizer = self.config.optimizer
        gradient[: self.head] *= -np.float32(optimizer.head_lr)
        gradient[self.head :] *= -np.float32(optimizer.client_lr)
        return gradient

    def _stepped(self, state, mean):
        options, gradient, count = self.config.aggregation, -mean, state.rounds + 1
        first, second = state.first, state.second
        if options.server_optimizer == "sgd":
            update = first = gradient + np.float32(options.server_momentum) * first
        elif options.server_optimizer == "adagrad":
            second = gradient**2 + second
            update = np.where(second > 0, gradient / np.sqrt(second + TAU**2), 0)
        else:
            square = gradient**2
            first = (1 - B1) * gradient + B1 * first
            adam = options.server_optimizer == "adam"
            second = (1 - B2) * square + B2 * second if adam else second - (1 - B2) * np.sign(second - square) * square
            update = first / (1 - B1**count) / (np.sqrt(second / (1 - B2**count)) + TAU)
        adapter = state.adapter - np.float32(self._rate(state.rounds)) * update
        return State(adapter, self._averaged(state, adapter), first, second, count)

    def _rate(self, done):
        """The server's learning rate after `done` rounds: it falls linearly over the planned ones."""
        fraction = min(done, self.config.schedule.rounds) / self.config.schedule.rounds
        return self.config.aggregation.server_lr * (1 + (self.config.optimizer.lr_decay - 1) * fraction)

    def _averaged(self, state, adapter):
        decay = np.float32(self.config.aggregation.ema)
        rate = (1 - decay) / (1 - decay ** np.float32(state.rounds + 1)) if decay else np.float32(1)
        return state.mean + rate * (adapter - state.mean)


def check(config):
    """InputError where silos over a network cannot run `config` (settled)."""
    aggregation = config.aggregation
    if aggregation.method != "fedavg" or aggregation.robust != "none":
        raise InputError("silos average uploads as they are: use aggregation=fedavg and robust=none.")
    if aggregation.upload_bits is not None:
        raise InputError("silos send whole numbers of 32 bits: leave out `upload_bits`.")
