"""The steps that a benchmark compares: plain LoRA, and noisy LoRA in each clipping form, on one batch of random rows.

Letters: B rows, T tokens.
"""

import os
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dplora_jax import lora, losses, models
from dplora_jax.config import Base
from dplora_jax.models import products
from dplora_jax.privacy import clipping, noise
from experiments.plan import flops
from experiments.plan import models as plan_models

RATE = 1e-4  # of the SGD that each step ends in: small, so that hundreds of steps of random rows stay finite
CLASSES = 3
LIMIT = "matmul"
REST = 0.3  # seconds before a call, where others' threads may still spin from the one before


class Case(NamedTuple):
    """What is measured. `model` is a name of `plan.models.KNOWN` (random weights, `layers` of them) or what `from_pretrained`
    takes; `task` is language_model or classification."""

    model: str
    layers: int | None
    batch: int
    length: int
    rank: int
    targets: tuple
    freeze_a: bool
    task: str
    dtype: str
    remat: bool
    last_layers: int | None = None  # are adapted, of all


class Step(NamedTuple):
    """A compiled step (params, adapter, batch) -> adapter, which takes the adapter's memory over. Bytes are by XLA's account:
    `peak` is arguments, temporaries and outputs together."""

    run: jax.stages.Compiled
    compile_seconds: float
    flops: int
    peak: int
    temporaries: int


def arguments(case):
    """(model, params, adapter, batch) of random rows, every token attended."""
    classes = CLASSES if case.task == "classification" else None
    if case.model in plan_models.KNOWN:
        model, _ = plan_models.build(Base(case.model, case.dtype, remat=case.remat), classes, case.layers)
        params = jax.jit(model.init)(jax.random.key(0))
    else:
        model, params = models.from_pretrained(case.model, case.dtype, classes)
    adapter = lora.init(jax.random.key(1), model, params, lora_config(case))
    if case.freeze_a:
        params, adapter = lora.freeze_a(params, adapter)
    shape, rng = (case.batch, case.length), np.random.default_rng(0)
    batch = {"input_ids": rng.integers(0, model.config.vocab_size, shape), "attention_mask": np.ones(shape)}
    if classes:
        batch["labels"] = rng.integers(0, classes, case.batch)
    return model, params, adapter, {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}


def lora_config(case):
    """The LoraConfig of the case's adapter."""
    return lora.LoraConfig(case.rank, 2.0 * case.rank, tuple(case.targets), case.last_layers)


def cores():
    """Processor cores of this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def loss_of(case):
    """The function (model, params) -> loss that the case trains."""
    return losses.classification if case.task == "classification" else losses.language_model


def functions(case, model, forms):
    """{name: step} as plain functions (params, adapter, batch) -> adapter: the plain step, and a noisy one in each of `forms`."""
    keys = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (noise.DRAWS, 2)), jnp.uint32)

    def update(adapter, grad):
        return optax.apply_updates(adapter, jax.tree.map(lambda g: -RATE / case.batch * g, grad))

    def plain(params, adapter, batch):
        loss = loss_of(case)(model, params)
        return update(adapter, jax.grad(lambda a: loss(a, batch).sum())(adapter))

    def noisy(form):
        def step(params, adapter, batch):
            grad, _, _ = clipping.clipped_grad_sum(loss_of(case)(model, params), adapter, batch, 1.0, form=form)
            return update(adapter, noise.add(grad, noise.gaussian(keys, grad, 1.0, 0)))

        return step

    return {"plain": plain} | {form: noisy(form) for form in forms}


def compiled(function, *args, donate=1):
    """`function` for arguments like `args` -> Step."""
    start = time.perf_counter()
    run = jax.jit(function, donate_argnums=donate).lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = run.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs
    return Step(run, seconds, flops.count(function, *args), peak, memory.temp_size_in_bytes)


def matmul(dtype):
    """The machine's limit: a product of two large square matrices -> (function without arguments, its operations)."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    narrow, wide = products.types(dtype)
    a = jnp.ones((side, side), narrow)
    run = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=wide)).lower(a).compile()
    return lambda: run(a), 2 * side**3


def interleaved(calls, repeats, rest=0.0):
    """Seconds of each of `calls` {name: function without arguments}, [repeats] each: one call of every one in turn, after a
    warm-up, and `rest` seconds before each."""
    times = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            time.sleep(rest)
            start = time.perf_counter()
            jax.block_until_ready(call())
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in times.items()}


def measure(case, forms, repeats, extra=None):
    """Each step's figures, and the machine's limit's -> {name: {"seconds": [repeats], "compile_seconds", "flops", "peak",
    "temporaries"}}; `extra` {name: function without arguments} is timed in turn with them."""
    model, params, adapter, batch = arguments(case)
    steps = {name: compiled(step, params, adapter, batch) for name, step in functions(case, model, forms).items()} | {
        "evaluation": compiled(lambda p, a, b: loss_of(case)(model, p)(a, b), params, adapter, batch, donate=())
    }
    current = {name: jax.tree.map(jnp.copy, adapter) for name in steps}

    def call(name):
        out = steps[name].run(params, current[name], batch)
        if name != "evaluation":
            current[name] = out
        return out

    product, operations = matmul(case.dtype)
    calls = {name: lambda name=name: call(name) for name in steps} | {LIMIT: product} | (extra or {})
    seconds = interleaved(calls, repeats, REST if extra and jax.default_backend() == "cpu" else 0.0)
    measured = {name: {"seconds": seconds[name].tolist()} | steps[name]._asdict() for name in steps}
    for row in measured.values():
        del row["run"]
    measured |= {name: {"seconds": seconds[name].tolist()} for name in extra or {}}
    return measured | {LIMIT: {"seconds": seconds[LIMIT].tolist(), "flops": operations}}
