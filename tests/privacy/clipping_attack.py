"""An attack on the clip norm: records made to move the clipped sum by more than they are read to.

    python -m tests.privacy.clipping_attack --minutes=60

draws shapes, dtypes, forms, clip norms and records until the time is up, and prints the largest move in clip norms. A record is a
loss that gives one adapted matrix chosen inputs and chosen cotangents: tokens that cancel, before a rounding or after it, equal
tokens, and scales over eighty orders of magnitude.

Letters: B rows, T tokens, I inputs, O outputs, R rank.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from dplora_jax import lora, losses
from dplora_jax.privacy import clipping

KINDS = ("plain", "equal", "pairs", "biased", "uneven", "sparse")
FORMS = ("vmap", "broadcast", "ghost", "auto")
DTYPES = ("float32", "bfloat16", "float16")


class Matrix:
    """One adapted matrix whose inputs are `x` [B, T, I] of the batch; its outputs, weighted by `g`, are the loss."""

    def __init__(self, dtype):
        self.dtype = jnp.dtype(dtype)

    def apply(self, params, batch, adapter):
        def layer(x, pair):
            return x, lora.product(batch["x"].astype(self.dtype), pair)

        return jax.lax.scan(layer, 0.0, adapter["layers"]["q"])[1].sum(0)


@functools.cache
def step(dtype, form, mode, bits=None):
    """`clipped_grad_sum` of the records, compiled: (adapter, batch, clip norm, weights) -> its results."""
    loss = losses.ModelLoss(Matrix(dtype), None, lambda y, batch: (y.astype(jnp.float32) * batch["g"]).sum((1, 2)))
    return jax.jit(lambda *a: clipping.clipped_grad_sum(loss, *a, form=form, mode=mode, bits=bits))


def tokens(rng, kind, rows, count, width):
    """`count` tokens [B, T, width] of about 1 in size, of a kind that some sum or rounding might be deceived by."""
    if kind == "equal":  # sums of many equal numbers err in one direction
        return np.broadcast_to(rng.uniform(1, 2, (rows, 1, 1)), (rows, count, width)).copy()
    if kind == "biased":  # these cancel exactly, and no longer once a product with a scale is rounded to few bits
        value = 1 + rng.integers(0, 64, (rows, 1, 1)) / 64
        sign = np.where(np.arange(count) % 5 < 3, 1.0, -1.5)[None, :, None]
        return np.broadcast_to(value * sign, (rows, count, width)).copy()
    y = rng.normal(size=(rows, count, width))
    if kind == "pairs":  # the second half takes the first one back, all but a trifle
        half = count // 2
        y[:, half : 2 * half] = -y[:, :half] * (1 + 10.0 ** rng.uniform(-8, 0))
    if kind == "uneven":  # tokens of very different size
        y *= 10.0 ** rng.uniform(-20, 0, (rows, count, 1))
    if kind == "sparse":
        y *= rng.random((rows, count, width)) < 0.05
    return y


def records(rng, kinds, shape, largest=15, scales=(1.0, 4 / 3, 0.1)):
    """(adapter, batch) of `shape` (B, T, I, O, R): kinds of cotangents and inputs, scaled apart, to a product of up to
    10^largest; the adapter's scale, for each of which a step compiles anew, is one of `scales`."""
    rows, count, inputs, outputs, rank = shape
    g, x = tokens(rng, kinds[0], rows, count, outputs), tokens(rng, kinds[1], rows, count, inputs)
    if kinds[0] in ("pairs", "biased"):  # they cancel where the inputs are alike
        x = np.broadcast_to(x[:, :1], x.shape)
    of_g = rng.uniform(-35, 10)
    of_x = rng.uniform(-20, min(20, largest - of_g))
    a = rng.normal(size=(1, rank, inputs)) if rng.random() < 0.5 else np.eye(rank, inputs)[None]
    b = rng.normal(size=(1, outputs, rank)) if rng.random() < 0.5 else np.zeros((1, outputs, rank))
    pair = lora.Pair(*(jnp.asarray(v, jnp.float32) for v in (a, b)), float(rng.choice(scales)))
    scaled = (np.clip(v * 10.0**power, -1e30, 1e30).astype(np.float32) for v, power in ((g, of_g), (x, of_x)))
    return {"layers": {"q": pair}}, dict(zip(("g", "x"), scaled, strict=True)) | {
        "input_ids": np.zeros((rows, count), np.int32)
    }


def size(tree):
    """The norm of a tree in float64."""
    return float(np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(tree))))


def moves(run, adapter, batch, clip_norm):
    """How far each record alone moves the sum, in clip norms [B]."""
    rows = batch["g"].shape[0]
    alone = (np.eye(rows, dtype=np.float32)[row] for row in range(rows))
    return np.array([size(run(adapter, batch, np.float32(clip_norm), weights)[0]) for weights in alone]) / clip_norm


def moves_among_others(run, adapter, batch, clip_norm):
    """How far each record moves the sum of all, in clip norms [B]."""
    rows = batch["g"].shape[0]
    every = np.ones(rows, np.float32)
    total = run(adapter, batch, np.float32(clip_norm), every)[0]

    def move(row):
        without = run(adapter, batch, np.float32(clip_norm), every - np.eye(rows, dtype=np.float32)[row])[0]
        return size(jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), total, without))

    return np.array([move(row) for row in range(rows)]) / clip_norm


def main():
    """Attack for so many minutes, and print what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, end, drawn, worst = np.random.default_rng(options.seed), time.monotonic() + 60 * options.minutes, 0, {}
    while time.monotonic() < end:
        dtype, form = rng.choice(DTYPES), rng.choice(FORMS)
        mode = rng.choice(clipping.MODES)
        shape = 2, *(int(2 ** rng.uniform(low, high)) for low, high in ((1, 8), (2, 10), (2, 10), (0, 8)))
        run = step(str(dtype), str(form), str(mode))
        for _ in range(40):
            kinds = [str(kind) for kind in rng.choice(KINDS, 2)]
            adapter, batch = records(rng, kinds, shape)
            clip_norm = 10.0 ** rng.uniform(-6, 3)
            move = moves(run, adapter, batch, clip_norm).max()
            among = moves_among_others(run, adapter, batch, clip_norm).max()
            drawn += 2
            if not among <= 1 + 1e-5:  # a sum of two rows rounds too
                print("BREACH AMONG OTHERS", among, dtype, form, mode, shape, kinds, clip_norm, flush=True)
            key = str(dtype), str(form)
            if not move <= worst.get(key, (0,))[0]:
                worst[key] = float(move), str(mode), shape, kinds
            if not move <= 1 + 1e-6:
                print("BREACH", move, dtype, form, mode, shape, kinds, clip_norm, flush=True)
        run.clear_cache()
    print(f"{drawn} records")
    for key, value in sorted(worst.items()):
        print(*key, *value)


if __name__ == "__main__":
    main()
