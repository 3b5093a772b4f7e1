"""The clients of a wave clip the rows of their batches together: fewer padding rows than each client's own capacity asks for.

Every client starts a round from the same adapter, so that in a single local step their rows go through one and the same model,
and only the sums are each client's own. The result is that of the clients apart, whatever was sampled: should more rows join than
the pool was sized for, more turns of the loop take them.

Letters: K clients, C rows of a client's capacity, M rows at a time.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from dplora_jax.federation.client import Sums, sample
from dplora_jax.privacy import clipping

OVERFLOW = 1e-9  # how likely a step may need more rows than its pool: its time then tells that many joined, and no more


def rows(mechanisms):
    """The rows that clients of these `accounting.Mechanism`s fill together in a step, but for a chance of OVERFLOW."""
    joined = np.ones(1)
    for m in mechanisms:
        own = scipy.stats.binom.pmf(np.arange(m.capacity + 1), m.part, m.join_rate)
        own[-1] += max(0.0, 1 - own.sum())  # beyond its capacity a client drops rows
        joined = np.convolve(joined, own)
    tail = np.cumsum(joined[::-1])[::-1]  # tail[i]: the chance of i rows or more
    return max(1, int((tail > OVERFLOW).sum()) - 1)


def at_a_time(pool, most):
    """M, at most `most`, so that `pool` rows are taken in turns of one size."""
    return -(-pool // -(-pool // min(pool, most)))


def sums(loss_fn, config, data, adapter, clients, keys):
    """Every client's sum of clipped gradients in local step 0 -> `client.Sums` of [K, ...].

    `clients` and `keys` are those of K clients; `config.pool` rows are taken M (`config.microbatch`, or one client's capacity, at
    most) at a time, and more of them where more joined."""
    if "batch" in keys:  # as the host drew and sent it
        weights = keys["weights"][:, 0]
        data = {name: array[:, 0].reshape(-1, *array.shape[3:]) for name, array in keys["batch"].items()}
        picked = jnp.arange(weights.size)
    else:
        picked, weights = jax.vmap(lambda client, keys: sample(config, client, keys, 0))(clients, keys)
        picked = clients.offset[:, None] + picked
    count, capacity = weights.shape
    size = at_a_time(config.pool, config.microbatch or config.capacity)
    order = jnp.argsort(-weights.reshape(-1), stable=True)  # those who joined come first
    turns = -(-order.size // size)

    def in_turns(values):
        values = values.reshape(-1)[order]
        return jnp.pad(values, (0, turns * size - order.size)).reshape(turns, size)

    owners = jnp.repeat(jnp.arange(count), capacity)
    joined = weights.sum()
    turn = {"row": in_turns(picked), "weight": in_turns(weights), "owner": in_turns(owners)}

    def take(turn):
        batch = {name: array[turn["row"]] for name, array in data.items()}
        return clipping.clipped_grad_sum(
            loss_fn, adapter, batch, config.clip_norm, turn["weight"], config.form, config.clipping,
            owners=(turn["owner"], count),
        )  # fmt: skip

    shapes = jax.eval_shape(take, jax.tree.map(lambda x: x[0], turn))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def step(total, turn):
        # How many turns there are follows public sizes alone, unless the pool overflows.
        wanted = (turn["index"] * size < config.pool) | (turn["index"] * size < joined)
        grad, norms, losses = jax.lax.cond(wanted, take, lambda _: nothing, turn)
        return jax.tree.map(jnp.add, total, grad), (norms, losses)

    total, per_row = jax.lax.scan(step, nothing[0], turn | {"index": jnp.arange(turns)})
    back = (jnp.zeros(order.size).at[order].set(x.reshape(-1)[: order.size]).reshape(weights.shape) for x in per_row)
    return Sums(weights, total, *back)
