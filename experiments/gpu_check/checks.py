"""Whether the private step is right on this device: clipping, noise, a compiled round, a run that is stopped and goes on.

Each part is a generator of lines, {name: value}; "passed" says whether a check did.
Letters: B rows, T tokens, I inputs, O outputs, R rank.
"""

import functools
import importlib.metadata
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from dplora_jax import lora, losses
from dplora_jax.config import Base, FederationConfig, replace
from dplora_jax.federation.federation import Federation
from dplora_jax.models import gpt2
from dplora_jax.privacy import clipping, noise
from experiments.plan import models as plan_models

# (dtype, precision of float32 products): "tensorfloat32" is what a GPU does unless told not to.
SETTINGS = (("bfloat16", "tensorfloat32"), ("float32", "tensorfloat32"), ("float32", "highest"))
FORMS = ("broadcast", "ghost", "vmap")
ROUNDING = 1e-6  # of float32, by which a row may move the sum by more than the clip norm
# The most that a clipped sum may differ from the float64 one, over its length: what bfloat16 and TF32 round.
ERRORS = {("bfloat16", "tensorfloat32"): 2e-2, ("float32", "tensorfloat32"): 2e-3, ("float32", "highest"): 1e-5}
SIGMAS = 6.0  # a check of noise raises a false alarm once in 5e8


def environment(small, folder):
    """The device and the versions."""
    device = jax.devices()[0]
    names = ("jax", "jaxlib", "flax", "torch", "peft", "transformers")
    versions = {name: _version(name) for name in names}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which(query[0]) else "none"
    yield (
        {"driver": driver, "python": sys.version.split()[0]}
        | versions
        | {
            "platform": " ".join(device.client.platform_version.split()),
            "device": device.device_kind,
            "devices": jax.device_count(),
            "passed": small or device.platform == "gpu",
        }
    )


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not there"


class Matrix:
    """One adapted matrix whose inputs are `x` [B, T, I] of the batch."""

    def __init__(self, dtype):
        self.dtype = jnp.dtype(dtype)

    def apply(self, params, batch, adapter):
        layer = lambda x, pair: (x, lora.product(batch["x"].astype(self.dtype), pair))  # noqa: E731
        return jax.lax.scan(layer, 0.0, adapter["layers"]["q"])[1].sum(0)


def clipping_forms(small, folder):
    """Each form in each setting, on chosen inputs and cotangents beside float64, and on a layer of GPT-2: how far a row alone
    moves the sum, in clip norms, and how far the sum is from the exact one."""
    for dtype, precision in SETTINGS:
        for what, case in (("chosen tokens", _chosen), ("GPT-2", _gpt2)):
            if what == "GPT-2" and precision == "highest":  # what the other settings are compared with
                continue
            for form in FORMS:
                line = {"of": what, "dtype": dtype, "products": precision, "form": form}
                with jax.default_matmul_precision(precision):
                    yield line | case(dtype, form, small, precision)


def _chosen(dtype, form, small, precision):
    """Rows of plain tokens, and of tokens that cancel: their gradients are small, and their products are not."""
    rows, count, inputs, outputs, rank = (4, 8, 16, 12, 4) if small else (16, 64, 768, 768, 32)
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(rows, count, inputs)), rng.normal(size=(rows, count, outputs))
    half, few = count // 2, rows // 2
    x[:few, half:], g[:few, half:] = x[:few, :half], -g[:few, :half] * (1 + 1e-3 * rng.random((few, half, 1)))
    x, g = (np.asarray(jnp.asarray(v, dtype), np.float64) for v in (x, g))
    a, b = (
        np.asarray(jnp.asarray(v, dtype), np.float64)
        for v in (rng.normal(size=(rank, inputs)), rng.normal(size=(outputs, rank)))
    )
    pair = lora.Pair(*(jnp.asarray(v[None], jnp.float32) for v in (a, b)), 1.0)
    exact = (  # of y = x A' B', whose loss is the sum of y g
        np.einsum("btr,bti->bri", g @ b, x),
        np.einsum("bto,btr->bor", g, x @ a.T),
    )
    norms = np.sqrt(sum(np.square(leaf).sum((1, 2)) for leaf in exact))
    clip_norm = float(np.median(norms)) / 2
    scale = np.minimum(1, clip_norm / norms)
    loss = losses.ModelLoss(Matrix(dtype), None, lambda y, batch: (y.astype(jnp.float32) * batch["g"]).sum((1, 2)))
    batch = {"x": jnp.asarray(x, jnp.float32), "g": jnp.asarray(g, jnp.float32)}
    batch["input_ids"] = jnp.zeros((rows, count), jnp.int32)
    run = _run(loss, {"layers": {"q": pair}}, batch, form)
    found = jax.tree.leaves(run(clip_norm, np.ones(rows))[0]["layers"]["q"])
    wanted = [np.einsum("b,bij->ij", scale, leaf) for leaf in exact]
    error = _length([f[0] - w for f, w in zip(found, wanted, strict=True)]) / _length(wanted)
    return _verdict(run, rows, clip_norm, error, ERRORS[dtype, precision])


def _gpt2(dtype, form, small, precision):
    """Beside the definition in float32 and exact products; bfloat16's own activations differ, so the error is told in float32
    alone."""
    run, rows = _gpt2_run(dtype, form, small)
    clip_norm = float(np.median(run(1.0, np.ones(rows))[1])) / 2
    error = None
    if dtype == "float32":
        exact = _gpt2_exact(small, clip_norm)
        found = run(clip_norm, np.ones(rows))[0]
        error = _length(jax.tree.leaves(jax.tree.map(np.subtract, found, exact))) / _length(jax.tree.leaves(exact))
    return _verdict(run, rows, clip_norm, error, 10 * ERRORS[dtype, precision])


def _gpt2_run(dtype, form, small):
    """(`_run` of a layer of GPT-2 and random rows, how many rows)."""
    model, params = _model(small, 1, dtype)
    adapter = lora.init(jax.random.key(1), model, params, lora.LoraConfig(8, 16.0))
    keys = iter(jax.random.split(jax.random.key(2), 99))
    # No B is zero, so that every A has a gradient.
    adapter = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape), adapter)
    rows, length = 4, 8 if small else 64
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length))
    batch = {"input_ids": jnp.asarray(ids, jnp.int32), "attention_mask": jnp.ones((rows, length), jnp.int32)}
    return _run(losses.language_model(model, params), adapter, batch, form), rows


@functools.cache
def _gpt2_exact(small, clip_norm):
    """The clipped sum by the definition, in float32 with exact products."""
    with jax.default_matmul_precision("highest"):
        run, rows = _gpt2_run("float32", "vmap", small)
        return run(clip_norm, np.ones(rows))[0]


def _model(small, depth, dtype):
    """(model, random params) of GPT-2's shape with `depth` layers; a tiny one for a rehearsal."""
    if small:
        model = gpt2.Gpt2(gpt2.Gpt2Config(50, 16, 1, 2, 32, 16), jnp.dtype(dtype))
    else:
        model, _ = plan_models.build(Base("gpt2", dtype), None, depth)
    return model, jax.jit(model.init)(jax.random.key(0))


def _run(loss, adapter, batch, form):
    """(clip norm, weights [B]) -> (sum as float64 arrays, norms, losses), compiled once."""
    step = jax.jit(lambda a, b, c, w: clipping.clipped_grad_sum(loss, a, b, c, w, form=form))

    def run(clip_norm, weights):
        out = step(adapter, batch, jnp.float32(clip_norm), jnp.asarray(weights, jnp.float32))
        return jax.tree.map(lambda x: np.asarray(x, np.float64), out)

    return run


def _verdict(run, rows, clip_norm, error, most):
    """What each row alone moves the sum by, in clip norms, and its unclipped length over the norm that is told of it."""
    alone = np.eye(rows)
    moves = [_length(jax.tree.leaves(run(clip_norm, weights)[0])) / clip_norm for weights in alone]
    free = [run(1e6 * clip_norm, weights) for weights in alone]
    short = [_length(jax.tree.leaves(total)) / norms.max() for total, norms, _ in free]
    good = max(moves) <= 1 + ROUNDING and max(short) <= 1 + ROUNDING and (error is None or error <= most)
    return {"largest move": max(moves), "length / norm": max(short), "error": error, "passed": bool(good)}


def _length(leaves):
    return float(np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in leaves)))


def noise_draws(small, folder):
    """Moments of the noise, its draws beside each other, and beside the CPU's."""
    side = 128 if small else 2048
    keys = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (noise.DRAWS, 2)), jnp.uint32)
    tree = {"a": jnp.zeros((side, side)), "b": jnp.zeros((side, side))}
    draw = jax.jit(lambda step: noise.gaussian(keys, tree, 2.0, step))
    here = {
        f"step {step}, leaf {name}": np.asarray(leaf, np.float64)
        for step in (0, 1)
        for name, leaf in draw(step).items()
    }
    for name, z in here.items():
        z, n = z.ravel() / 2, z.size
        off = [z.mean() * n**0.5, (z.var() - 1) * (n / 2) ** 0.5, ((z**4).mean() - 3) * (n / 96) ** 0.5]
        yield {
            "draw": name,
            "off in standard errors": off,
            "largest": abs(z).max(),
            "passed": bool(max(map(abs, off)) < SIGMAS),
        }
    first, *others = (z.ravel() for z in here.values())
    for name, other in zip(list(here)[1:], others, strict=True):
        off = float((first * other).mean() / 4 * first.size**0.5)
        yield {
            "draw": f"step 0, leaf a with {name}",
            "correlation in standard errors": off,
            "passed": abs(off) < SIGMAS,
        }
    there = _on_cpu(keys, tree)
    gap = max(float(abs(here[f"step 0, leaf {name}"] - there[name]).max()) / 2 for name in tree)
    same = float(np.mean([np.mean(here[f"step 0, leaf {name}"] == there[name]) for name in tree]))
    yield {"draw": "beside the CPU's", "largest difference": gap, "share of equal bits": same, "passed": gap < 1e-4}


def _on_cpu(keys, tree):
    """The noise of step 0 as the CPU draws it."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        keys, tree = jax.device_put((keys, tree), cpu)
        return jax.tree.map(
            lambda x: np.asarray(x, np.float64), jax.jit(lambda k: noise.gaussian(k, tree, 2.0, 0))(keys)
        )


def reference(small, folder):
    """The federation of `federation` on the CPU."""
    with jax.default_matmul_precision("highest"):
        adapter = _train(small, None)
    np.savez(folder / "reference.npz", *adapter)
    yield {"rounds": 4, "numbers": sum(leaf.size for leaf in adapter)}


def federation(small, folder):
    """Four noisy rounds in two dispatches, beside the CPU's; and the same, stopped after the first dispatch and begun again."""
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))  # the three runs compile once
    with jax.default_matmul_precision("highest"):
        whole = _train(small, folder / "whole")
        finite = all(np.isfinite(leaf).all() for leaf in whole)
        yield {"check": "every number is finite", "passed": bool(finite)}
        if (folder / "reference.npz").exists():
            with np.load(folder / "reference.npz") as there:
                pairs = list(zip(whole, there.values(), strict=True))
            gap = _length([a - b for a, b in pairs]) / _length(whole)
            yield {"check": "beside the CPU's", "difference": gap, "passed": gap < 1e-3}
        _train(small, folder / "parts", stop=True)
        again = _train(small, folder / "parts")
    same = all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))
    yield {"check": "stopped and begun again, it releases the same bits", "passed": same}


def _train(small, workdir, stop=False):
    """The released adapter's leaves of a federation of three clients; None where it is stopped after a dispatch."""
    model, params = _model(small, 2, "float32")
    fields = {
        "clients": 3,
        "rounds": 4,
        "dispatch_rounds": 2,
        "expected_batch_size": 8.0,
        "rank": 8,
        "noise_multiplier": 1.0,
    }
    config = replace(FederationConfig(), **fields, client_lr=0.05, eval_every=0, seed=0, mesh="1x1")
    length = 8 if small else 32
    rng, shards = np.random.default_rng(0), []
    for count in (48, 64, 40):
        ids = rng.integers(0, model.config.vocab_size, (count, length), np.int32)
        shards.append({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    made = Federation(model, params, losses.language_model, config)
    for _ in made.fit(shards, workdir, stop=lambda: stop):
        pass
    return None if stop else [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(made.adapter)]


PARTS = {
    "environment": environment,
    "clipping": clipping_forms,
    "noise": noise_draws,
    "reference": reference,
    "federation": federation,
}
