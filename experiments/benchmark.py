"""What the private step costs: noisy against plain LoRA steps of the same model and shapes, interleaved in one process.

    python -m experiments.benchmark --model=all-MiniLM-L6-v2 --batch=64 --length=32 --rank=4

prints, for each form of the step, the median time, its ratio to the fastest plain step of the same round of the
interleaving (median and quartiles), examples and tokens a second; then how long calibration takes for five clients.
With `--measure=memory` it prints what loading, the loss and frozen weights in fewer bits take (experiments/memory.py),
and with `--measure=clients` what a round of many clients takes (experiments/scale.py).
"""

import platform
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from dplora_jax import lora, losses, models
from dplora_jax.errors import InputError
from dplora_jax.privacy import accounting, clipping, noise
from experiments import memory, scale


def define():
    """The benchmark's flags."""
    values = flags.FlagValues()
    flags.DEFINE_string("model", "all-MiniLM-L6-v2", "the base model", flag_values=values)
    flags.DEFINE_integer("batch", 64, "rows of a step", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("length", 32, "tokens of a row", lower_bound=2, flag_values=values)
    flags.DEFINE_integer("rank", 4, "LoRA rank", lower_bound=1, flag_values=values)
    flags.DEFINE_list("targets", ["q", "v"], "matrices to adapt", flag_values=values)
    flags.DEFINE_boolean("freeze_a", False, "train B alone", flag_values=values)
    flags.DEFINE_enum("measure", "time", ["time", "memory", "clients"], "what to measure", flag_values=values)
    flags.DEFINE_list(
        "clients", list(map(str, scale.CLIENTS)), "how many clients, for each of them", flag_values=values
    )
    flags.DEFINE_integer("records", 20, "records of each of many clients", lower_bound=4, flag_values=values)
    flags.DEFINE_float("gigabytes", 1.2, "size of the model made to measure loading", flag_values=values)
    flags.DEFINE_string("frozen", "SmolLM2-135M-Instruct", "the base to hold in fewer bits", flag_values=values)
    flags.DEFINE_integer("repeats", 9, "how often each form is timed", lower_bound=3, flag_values=values)
    return values


def steps(config):
    """{name: step}, each a compiled function of one adapter, and the adapter: one plain form, and a noisy step in each
    clipping form, all ending in the same SGD update."""
    model, params = models.from_pretrained(config.model, num_labels=3)
    adapter = lora.init(
        jax.random.key(0), model, params, lora.LoraConfig(config.rank, 2.0 * config.rank, tuple(config.targets))
    )
    if config.freeze_a:
        params, adapter = lora.freeze_a(params, adapter)
    shape, rng = (config.batch, config.length), np.random.default_rng(0)
    batch = {
        "input_ids": jnp.asarray(rng.integers(0, model.config.vocab_size, shape), jnp.int32),
        "attention_mask": jnp.ones(shape, jnp.int32),
        "labels": jnp.asarray(rng.integers(0, 3, config.batch), jnp.int32),
    }
    keys = jnp.asarray(rng.integers(0, 2**32, (noise.DRAWS, 2)), jnp.uint32)

    def update(adapter, grad):
        return optax.apply_updates(adapter, jax.tree.map(lambda g: -0.1 * g / config.batch, grad))

    def plain(params, adapter):
        loss = losses.classification(model, params)
        return update(adapter, jax.grad(lambda a: loss(a, batch).sum())(adapter))

    def noisy(form):
        def step(params, adapter):
            grad, _, _ = clipping.clipped_grad_sum(losses.classification(model, params), adapter, batch, 1.0, form=form)
            return update(adapter, noise.add(grad, noise.gaussian(keys, grad, 1.0, 0)))

        return step

    forms = {"plain": plain} | {f"noisy, {form}": noisy(form) for form in ("auto", "broadcast", "vmap", "ghost")}
    return {name: jax.jit(step).lower(params, adapter).compile() for name, step in forms.items()}, (params, adapter)


def interleaved(functions, arguments, repeats):
    """Seconds of each function, [repeats] each: one call of every function in turn, after a warm-up."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in times.items()}


def main(argv=None):
    """Print the table -> exit code."""
    config = define()
    try:
        config(["benchmark", *(sys.argv[1:] if argv is None else argv)])
        if config.measure == "memory":
            for lines in (
                memory.loading(config.gigabytes),
                memory.next_token_loss(8, 512, 64),
                memory.frozen_base(config.frozen),
            ):
                for line in lines:
                    print(line, flush=True)
            return 0
        if config.measure == "clients":
            counts = [int(count) for count in config.clients]
            for line in scale.table(config.model, counts, scale.WAVES, config.records, config.length, config.repeats):
                print(line, flush=True)
            return 0
        functions, arguments = steps(config)
    except (flags.Error, InputError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{config.model}, batch {config.batch}, length {config.length}, rank {config.rank} on {','.join(config.targets)}; "
          f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}")  # fmt: skip
    print(f"{'step':18} {'median s':>9} {'/ plain':>8} {'quartiles':>14} {'examples/s':>11} {'tokens/s':>9}")
    times = interleaved(functions, arguments, config.repeats)
    for name, seconds in times.items():
        low, ratio, high = np.quantile(seconds / times["plain"], [0.25, 0.5, 0.75])
        rate = config.batch / np.median(seconds)
        print(
            f"{name:18} {np.median(seconds):9.3f} {ratio:8.3f} {low:6.3f} .. {high:5.3f} {rate:11.1f} {rate * config.length:9.0f}"
        )
    sizes = (120, 310, 640, 1100, 1700)
    start = time.perf_counter()
    accounting.calibrate(sizes, 64, 50, 8.0, 1e-5)
    print(f"calibrating sigma for clients of {sizes} records: {time.perf_counter() - start:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
