"""What a noisy step should take at least on chips that are not at hand, from its products, its bytes and their published peaks.

    python -m experiments.benchmark --model=llama2-7b --batch=8 --length=512 --rank=8 --measure=roofline

Nothing runs, and of models known by name no weights are made: operations are counted in the traced step (flops.py), bytes are
those of its arrays. Assumed: the base in bfloat16, products at the bfloat16 peak, but norms and clipped sums in exact float32
(on a TPU six bfloat16 passes, on an H100 outside its tensor cores); every weight is read twice (forward, backward) and the
adapter three times, every array that the backward pass needs is written once and read once, all else stays on the chip;
compute, memory and interconnect overlap. The interconnect carries what a federation of CHIPS chips sums in a round of one
local step, the adapter in float32, in a ring. So times are least times.
"""

from typing import NamedTuple

import jax

from dplora_jax.privacy import clipping
from experiments.benchmark import steps as benchmark_steps
from experiments.plan import flops
from experiments.text import formats
from experiments.text.tables import Table

CHIPS = 8
BASE = "bfloat16"


class Chip(NamedTuple):
    """Published peaks, a second: bfloat16 operations, exact float32 ones, bytes of memory, bytes sent to the next chip."""

    bfloat16: float
    exact: float
    bandwidth: float
    link: float


PEAKS = {
    # NVIDIA H100 SXM datasheet: dense bfloat16, float32, HBM3, and one direction of NVLink.
    "h100": Chip(989e12, 67e12, 3.35e12, 450e9),
    "h200": Chip(989e12, 67e12, 4.8e12, 450e9),  # its datasheet: an H100 with HBM3e
    # Cloud TPU documentation, "TPU v5e"; a ring uses two of a chip's links, 50 GB/s each.
    "v5e": Chip(197e12, 197e12 / 6, 819e9, 100e9),
}


def lines(case, chips):
    """A line for each of `chips` (names of PEAKS)."""
    estimates = {form: estimate(case, form) for form in ("plain", "auto")}
    body = []
    for chip in chips:
        for form, amounts in estimates.items():
            (products, exact, traffic, _), times = amounts, times_of(amounts, PEAKS[chip])
            body.append(
                [f"{chip}, {form}", f"{products / 1e12:.2f}", f"{exact / 1e12:.3f}", formats.size(traffic)]
                + [f"{seconds:.4f}" for seconds in times]
                + [f"{case.batch / max(times):.1f}"]
            )
    head = [
        "least times at published peaks",
        "TFLOP",
        "exact",
        "traffic",
        "compute s",
        "memory s",
        "sent s",
        "examples/s",
    ]
    yield from Table(head, body).text().splitlines()


def times_of(amounts, peak):
    """(seconds of compute, of memory, of sending) of what `estimate` gives, at a chip's `peak`."""
    products, exact, traffic, sent = amounts
    return (products - exact) / peak.bfloat16 + exact / peak.exact, traffic / peak.bandwidth, sent / peak.link


def estimate(case, form):
    """(operations, exact ones of these, bytes of memory traffic, bytes sent by a chip) of the step of `form`."""
    model, params, adapter, batch = shapes(case)
    step = benchmark_steps.functions(case, model, ["auto"])[form]
    exact = flops.count(step, params, adapter, batch, exact=True)
    loss = lambda params: benchmark_steps.loss_of(case)(model, params)  # noqa: E731

    def kept(params, adapter, batch):
        return jax.vjp(lambda a: loss(params)(a, batch), adapter)[1]

    residuals, known = jax.eval_shape(kept, params, adapter, batch), jax.tree.leaves((params, adapter, batch))
    shapes_known = {(leaf.shape, leaf.dtype) for leaf in known}  # weights are among what the backward pass needs
    traffic = 2 * sum(_bytes(x) for x in jax.tree.leaves(residuals) if (x.shape, x.dtype) not in shapes_known)
    base, trained = _size(params), _size(adapter)
    traffic += 2 * base + 3 * trained
    if form != "plain":  # what tells of each row's gradient is written and read, and the noise is added in passing
        slots = clipping.slots_of("auto", loss(params), adapter, batch)
        traffic += 2 * _size(slots)
    sent = 2 * (CHIPS - 1) / CHIPS * trained
    return flops.count(step, params, adapter, batch), exact, traffic, sent


def shapes(case):
    """`benchmark_steps.arguments` of the case with its base in bfloat16, arrays as jax.ShapeDtypeStruct."""
    models = []

    def make():
        model, *arrays = benchmark_steps.arguments(case._replace(dtype=BASE))
        models.append(model)
        return arrays

    arrays = jax.eval_shape(make)
    return models[0], *arrays


def _size(tree):
    return sum(map(_bytes, jax.tree.leaves(tree)))


def _bytes(leaf):
    return leaf.size * leaf.dtype.itemsize
