"""What a step costs on this device: the noisy step beside the plain one and PEFT's, and attention in two forms.

Each part is a generator of lines, {name: value}. Times are medians, with quartiles of ratios of the same turn.
"""

import gc

import jax
import jax.numpy as jnp
import numpy as np

from dplora_jax.models import layers
from experiments.benchmark import peers, roofline
from experiments.benchmark import steps as benchmark_steps
from experiments.benchmark import table as benchmark_table

REPEATS = 9
CELLS = tuple((batch, 512, rank) for batch in (8, 32) for rank in (8, 64))
SMALL = ((2, 16, 4),)


def gpt2(small, folder):
    """GPT-2 of 124 million parameters."""
    yield from _cells("gpt2", small, remat=())


def llama(small, folder):
    """Llama 3.2's shape of a billion; 32 rows of it need their activations made again."""
    yield from _cells("smollm2-135m" if small else "llama3.2-1b", small, remat=(32,))


def _cells(model, small, remat):
    for batch, length, rank in SMALL if small else CELLS:
        layers = 1 if small else None
        case = benchmark_steps.Case(
            model, layers, batch, length, rank, ("q", "v"), False, "language_model", "bfloat16", batch in remat
        )
        others = peers.peft_alone(case)
        try:
            measured = benchmark_steps.measure(case, ["auto"], 3 if small else REPEATS, others)
            yield _line(case, measured, others)
        except jax.errors.JaxRuntimeError as error:  # out of memory: the cells that follow may fit
            yield {"model": case.model, "rows": f"{batch}x{length}", "rank": rank, "failed": str(error)[:200]}
        del others
        gc.collect()
        jax.clear_caches()


def _line(case, measured, others):
    """One cell: seconds, ratios, the least times by the roofline, memory."""
    kind = jax.devices()[0].device_kind.lower()
    peak = next((peak for name, peak in roofline.PEAKS.items() if name in kind), roofline.PEAKS["h100"])
    seconds = {name: float(np.median(row["seconds"])) for name, row in measured.items()}
    line = {"model": case.model, "rows": f"{case.batch}x{case.length}", "rank": case.rank, "remat": case.remat}
    line |= {
        "plain s": seconds["plain"],
        "noisy s": seconds["auto"],
        "noisy / plain": _ratios(measured, "auto", "plain"),
    }
    for name in others:
        line |= {f"{name} s": seconds[name], f"our plain / {name}": _ratios(measured, "plain", name)}
    for ours, name in (("plain", "plain"), ("noisy", "auto")):
        compute, memory, _ = roofline.times_of(roofline.estimate(case, name), peak)
        line[f"{ours}, least s"] = max(compute, memory)
    line["plain of matmul"] = benchmark_table.share(measured, "plain")
    line |= {f"{ours} GB": measured[name]["peak"] / 1e9 for ours, name in (("plain", "plain"), ("noisy", "auto"))}
    most = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return line | {"device's peak so far, GB": most / 1e9, "compile s": measured["auto"]["compile_seconds"]}


def _ratios(measured, name, other):
    return benchmark_table.ratios(measured, name, other).tolist()


def attention(small, folder):
    """`layers.attention` beside `jax.nn.dot_product_attention`, forward and backward, of padded rows under a causal mask: the
    largest differences from float32 with exact products, and the times."""
    shapes = {"GPT-2": (2, 16, 2, 2, 8)} if small else {"GPT-2": (8, 512, 12, 12, 64), "Llama": (8, 512, 32, 8, 64)}
    for name, (batch, length, heads, groups, width) in shapes.items():
        rng = np.random.default_rng(0)
        q, k, v = (
            jnp.asarray(rng.normal(size=(batch, length, n, width)), jnp.bfloat16) for n in (heads, groups, groups)
        )
        lengths = jnp.asarray(rng.integers(length // 2, length + 1, batch))
        keys = jnp.arange(length) < lengths[:, None]
        mask = jnp.tril(jnp.ones((length, length), bool)) & keys[:, None]
        weights = jnp.asarray(rng.normal(size=(batch, length, heads * width)), jnp.float32) * keys[..., None]
        forms = {"ours": lambda q, k, v, mask=mask: layers.attention(q, k, v, mask)}
        forms |= {kind: _library(kind, mask) for kind in ("xla", "cudnn")}
        calls, exact = {}, None
        with jax.default_matmul_precision("highest"):
            exact = _graded(forms["ours"], weights)(*(x.astype(jnp.float32) for x in (q, k, v)))
        lines = {}
        for form, function in forms.items():
            try:
                run = _graded(function, weights)
                gap = jax.tree.map(lambda a, b: float(abs(a.astype(jnp.float32) - b).max()), run(q, k, v), exact)
            except Exception as error:  # cuDNN's form is there on NVIDIA's GPUs alone, and refuses some shapes
                yield {
                    "shape": name,
                    "form": form,
                    "refused": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}",
                }
                continue
            calls[form] = lambda run=run, qkv=(q, k, v): run(*qkv)
            lines[form] = {"shape": name, "form": form, "output off": gap[0], "gradients off": max(gap[1])}
        seconds = benchmark_steps.interleaved(calls, 3 if small else 20)
        for form, line in lines.items():
            ratio = np.quantile(seconds[form] / seconds["ours"], [0.25, 0.5, 0.75]).tolist()
            yield line | {"s": float(np.median(seconds[form])), "/ ours": ratio}


def _library(kind, mask):
    def run(q, k, v):
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=kind)
        return out.reshape(*out.shape[:2], -1)

    return run


def _graded(function, weights):
    """Compiled: (q, k, v) -> (output where a token is attended, gradients of its weighted sum)."""

    def loss(q, k, v):
        out = function(q, k, v)
        return (out.astype(jnp.float32) * weights).sum(), out * (weights != 0)

    def run(q, k, v):
        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, grads

    return jax.jit(run)


PARTS = {"attention": attention, "gpt2": gpt2, "llama": llama}
