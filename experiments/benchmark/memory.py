"""What things take in memory: loading a base, the language model's loss, and frozen weights in fewer bits.

    python -m experiments.benchmark --measure=memory

The machine's own account is asked where there is one (/proc for loading, XLA's analysis of the compiled step for the loss).
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from dplora_jax import lora, losses, models
from dplora_jax.models import gpt2, llama, quantized
from experiments.text import formats
from experiments.text.tables import Table

SENTENCES = (
    "The central bank raised interest rates by a quarter of a percentage point on Wednesday, citing persistent inflation.",
    "Operating profit fell to EUR 12.1 mn from EUR 15.4 mn in the corresponding period a year earlier.",
    "The patient was given a short course of antibiotics and sent home the next morning.",
    "Our new factory will double the capacity for recycled fibre and employ about two hundred people.",
)
# A child process of its own: what others have allocated and freed would hide what loading takes.
CHILD = """
import json, sys, threading, time
import jax, jax.numpy as jnp
from dplora_jax import models
from dplora_jax.models import quantized
def anonymous():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("RssAnon")) * 1024
jax.block_until_ready(jnp.ones(3) + 1)
path, dtype, kind = sys.argv[1:]
before, seen, done = anonymous(), [0], threading.Event()
def watch():
    while not done.is_set():
        seen[0] = max(seen[0], anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
model, params = models.from_pretrained(path, jnp.dtype(dtype), quantize=kind or None)
jax.block_until_ready(params)
done.set()
thread.join()
print(json.dumps({"peak": max(seen[0], anonymous()) - before, "parameters": quantized.nbytes(params)}))
"""


def write_llama(directory, gigabytes, shards=4):
    """A Llama checkpoint of about `gigabytes` GB of float32 in `shards` files, of random numbers, written file by file."""
    directory = pathlib.Path(directory)
    width, mlp, vocab = 1024, 2816, 32000
    per_layer = 4 * width * width + 3 * width * mlp
    layers = max(1, round((gigabytes * 1e9 / 4 - 2 * vocab * width) / per_layer))
    hf = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": 8, "vocab_size": vocab, "max_position_embeddings": 2048,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(hf))
    model = llama.Llama(llama.from_config(hf, None))
    shapes, names = jax.eval_shape(model.init, jax.random.key(0)), {}
    for weight in model.weights():
        shape = shapes
        for key in weight.path:
            shape = shape[key]
        stacked = "{}" in weight.name
        one = shape.shape[1:] if stacked else shape.shape
        for i in range(layers if stacked else 1):
            names[weight.tensor.format(i)] = one[::-1] if weight.part == "kernel" else one
    rng, index, order = np.random.default_rng(0), {}, sorted(names)
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: rng.standard_normal(names[name], np.float32) for name in order[k::shards]}
        safetensors.numpy.save_file(part, directory / file)
        index.update(dict.fromkeys(part, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def loading(gigabytes):
    """Lines on the peak anonymous memory of loading a made checkpoint, less that before, over the parameters' bytes."""
    body = []
    with tempfile.TemporaryDirectory() as directory:
        write_llama(directory, gigabytes)
        for dtype, kind in (("float32", ""), ("bfloat16", ""), ("bfloat16", "int8"), ("bfloat16", "nf4")):
            arguments = [sys.executable, "-c", CHILD, directory, dtype, kind]
            out = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
            sizes = [formats.size(out[name]) for name in ("parameters", "peak")]
            body.append([f"{dtype} {kind}".strip(), *sizes, f"{out['peak'] / out['parameters']:.2f}"])
    yield Table(["loading (sharded safetensors)", "parameters", "peak", "ratio"], body).text()


def next_token_loss(batch, length, max_targets):
    """Lines on the temporary memory of a LoRA gradient of GPT-2-small's shape in each form of the loss, by XLA's analysis."""
    model = gpt2.Gpt2(gpt2.Gpt2Config(50257, 768, 12, 12, 3072, 1024, remat=True))
    params = jax.eval_shape(model.init, jax.random.key(0))
    adapter = jax.eval_shape(lambda k: lora.init(k, model, params, lora.LoraConfig(8, 16.0)), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    rows = {"input_ids": ids, "attention_mask": ids, "loss_mask": ids}
    forms = {
        "all logits at once": lambda m, p: losses.ModelLoss(m, p, losses.language_model_of_logits),
        "in chunks": losses.language_model,
        f"in chunks, {max_targets} targets a row": lambda m, p: losses.language_model(m, p, max_targets),
    }
    body = []
    for name, make in forms.items():
        step = jax.jit(lambda p, a, rows, make=make: jax.grad(lambda a: make(model, p)(a, rows).sum())(a))
        analysis = step.lower(params, adapter, rows).compile().memory_analysis()
        body.append([name, formats.size(analysis.temp_size_in_bytes)])
    yield Table([f"GPT-2 gradient, remat, [{batch}, {length}]", "temporary"], body).text()


def frozen_base(name, steps=10):
    """Lines on the base's bytes, its loss on four sentences, and that after `steps` LoRA steps, for each kind of weights."""
    table = models.load_tokenizer(name)(list(SENTENCES), padding=True, return_tensors="np")
    rows = {key: jnp.asarray(table[key], jnp.int32) for key in ("input_ids", "attention_mask")}
    body = []
    for kind in (None, *quantized.KINDS):
        model, params = models.from_pretrained(name, quantize=kind)
        adapter = lora.init(jax.random.key(0), model, params, lora.LoraConfig(8, 16.0))
        optimizer = optax.adam(1e-3)

        @jax.jit
        def train(params, adapter, model=model, optimizer=optimizer):
            def step(carry, _):
                adapter, state = carry
                loss = losses.language_model(model, params)
                value, grad = jax.value_and_grad(lambda a: loss(a, rows).mean())(adapter)
                updates, state = optimizer.update(grad, state)
                return (optax.apply_updates(adapter, updates), state), value

            return jax.lax.scan(step, (adapter, optimizer.init(adapter)), None, steps + 1)[1]

        trace = np.asarray(train(params, adapter))
        body.append([kind or "float32", formats.size(quantized.nbytes(params)), f"{trace[0]:.4f}", f"{trace[-1]:.4f}"])
    yield Table([name, "base", "loss", f"after {steps}"], body).text()
