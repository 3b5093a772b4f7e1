"""The clients of a wave clip the rows of their batches together: fewer padding rows than each client's own capacity asks for.

Every client starts a round from the same adapter, so that in a single local step their rows go through one and the same model,
and only the sums are each client's own. The result is that of the clients apart, whatever was sampled: should more rows join than
the pool was sized for, more turns of the loop take them.

Letters: K clients, C rows of a client's capacity, M rows at a time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from dplora_jax.federation.client import Sums, whole

OVERFLOW = 1e-9  # how likely a step may need more rows than its pool: its time then tells that many joined, and no more


def rows(mechanisms):
    """The rows that clients of these `accounting.Mechanism`s fill together in a step, but for a chance of OVERFLOW."""
    joined = np.ones(1)
    for m in mechanisms:
        row_chances = scipy.stats.binom.pmf(np.arange(m.capacity + 1), m.part, m.join_rate)
        row_chances[-1] += max(0.0, 1 - row_chances.sum())  # beyond its capacity a client drops rows
        joined = np.convolve(joined, row_chances)
    tail = np.cumsum(joined[::-1])[::-1]  # tail[i]: the chance of i rows or more
    return max(1, int((tail > OVERFLOW).sum()) - 1)


def at_a_time(pool, most):
    """M, at most `most`, so that `pool` rows are taken in turns of one size."""
    return -(-pool // -(-pool // min(pool, most)))


@dataclasses.dataclass(frozen=True)
class Pooled:
    """In the place of `client.Apart`: the clients of a wave fill `rows` rows together, in their only local step. They are taken M
    (`microbatch`, or one client's capacity, at most) at a time, and more of them where more joined."""

    rows: int

    def check(self, rounds):
        """Raise ValueError where rows of several clients of `rounds` (a `round.Rounds`) may not be clipped together."""
        local, method = rounds.local, rounds.method
        if local.local_steps > 1 or not local.clipper.pools or not local.noise.pools or local.cut is not whole:
            raise ValueError(
                "rows are pooled in a single local step of one adapter and one finite clip norm, in floating point."
            )
        if method.personal or rounds.attendance.keys:
            raise ValueError("rows are pooled where every client starts from one adapter and takes part.")

    def prepare(self, loss_fn, local, data, adapter, clients, keys):
        """Every client's sum of clipped gradients in local step 0 -> `client.Sums` of [K, ...]."""
        data, picked, weights = local.batches.first_picks(local, data, clients, keys)
        turns, order = _turns(picked, weights, at_a_time(self.rows, local.microbatch or local.capacity))
        count, size = len(weights), turns["weight"].shape[1]

        @functools.partial(jax.jit, inline=True)  # traced once, for its shapes and for its turns
        def take(turn):
            batch = local.batches.gather(data, turn["picked"])
            norm, owners = local.clipper.clip_norm, (turn["owner"], count)
            return local.clipper.sum(loss_fn, adapter, batch, turn["weight"], norm, owners=owners)

        shapes = jax.eval_shape(take, jax.tree.map(lambda x: x[0], turns))
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        joined = weights.sum()

        def step(total, turn):
            # How many turns there are follows public sizes alone, unless the pool overflows.
            wanted = (turn["index"] * size < self.rows) | (turn["index"] * size < joined)
            grad, norms, losses = jax.lax.cond(wanted, take, lambda _: nothing, turn)
            return jax.tree.map(jnp.add, total, grad), (norms, losses)

        total, per_row = jax.lax.scan(step, nothing[0], turns)
        back = (
            jnp.zeros(order.size).at[order].set(x.reshape(-1)[: order.size]).reshape(weights.shape) for x in per_row
        )
        return Sums(weights, total, *back)

    def sums(self, prepared, loss_fn, local, data, client, keys):
        """The function (adapter, index, clip_norm) -> Sums of one client's only step: what was prepared for it."""
        return lambda adapter, index, clip_norm: prepared

    def padded_rows(self, local, clients):
        """How many rows a step of `clients` clients computes, padding included."""
        size = at_a_time(self.rows, local.microbatch or local.capacity)
        return -(-self.rows // size) * size


def _turns(picked, weights, size):
    """What K clients `picked` (a pytree of [K, C, ...]) in turns of `size` -> ({"picked": [turns, size, ...], "weight", "owner":
    [turns, size], "index"}, their order [K C])."""
    count = len(weights)
    order = jnp.argsort(-weights.reshape(-1), stable=True)  # those who joined come first
    turns = -(-order.size // size)

    def in_turns(values):
        values = values.reshape(order.size, *values.shape[2:])[order]
        padded = jnp.pad(values, [(0, turns * size - order.size), *[(0, 0)] * (values.ndim - 1)])
        return padded.reshape(turns, size, *values.shape[1:])

    owners = jnp.broadcast_to(jnp.arange(count)[:, None], weights.shape)
    turn = {"picked": jax.tree.map(in_turns, picked), "weight": in_turns(weights), "owner": in_turns(owners)}
    return turn | {"index": jnp.arange(turns)}, order
