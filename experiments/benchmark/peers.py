"""The same step by other programs, for comparison: PyTorch with PEFT, Opacus by hooks and by ghost clipping, jax_privacy.

    pip install -e '.[bench]'
    python -m experiments.benchmark --model=gpt2 --batch=8 --length=128 --rank=8 --peers

Same shapes and random weights (GPT-2 and Llama as transformers builds them), same process, PyTorch with a thread for each core,
as XLA has. Every step ends in an update by SGD. With --dtype=mixed PyTorch holds float32 and multiplies bfloat16 (its autocast).
"""

import contextlib
import importlib.util
import sys
import warnings

import jax
import numpy as np

from dplora_jax.errors import InputError
from dplora_jax.models import products
from experiments.benchmark import steps as benchmark_steps
from experiments.plan import models as plan_models

MODULES = {
    "gpt2": {"q,v": ["c_attn"], "all-linear": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]},
    "llama": {"q,v": ["q_proj", "v_proj"], "all-linear": "all-linear"},
}


def calls(case):
    """{name: a function without arguments that runs one step} of the PEERS that can. Raises InputError where none could, or they
    are not installed."""
    known = case.dtype in ("float32", products.MIXED) and case.model in plan_models.KNOWN
    if case.task != "language_model" or case.freeze_a or not known:
        raise InputError("--peers runs language models of random weights in float32 or mixed, with A and B trained.")
    try:
        import torch
    except ImportError:
        raise InputError("--peers needs PyTorch, PEFT and Opacus: pip install -e '.[bench]'.") from None
    torch.manual_seed(0)
    torch.set_num_threads(benchmark_steps.cores())
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, _hf(case)["vocab_size"], (case.batch, case.length)))
    runs = {}
    for name, make in PEERS.items():
        try:
            runs[name] = make(case, ids)
            runs[name]()
        except Exception as error:  # a peer that cannot run this is no reason to leave the others out
            runs.pop(name, None)
            print(f"{name} cannot run this: {' '.join(str(error).split())[:200]}", file=sys.stderr)
    return runs


def peft_alone(case):
    """{name: a function without arguments that runs one plain step of PEFT's} in the case's dtype, the adapter in float32, on the
    GPU where PyTorch sees one; {} where PyTorch or PEFT are not installed, or cannot run this."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "peft")):
        return {}
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.manual_seed(0)
        ids = np.random.default_rng(0).integers(0, _hf(case)["vocab_size"], (case.batch, case.length))
        step = _plain(case, torch.from_numpy(ids).to(device))
        step()
    except Exception as error:
        print(f"PEFT cannot run this: {' '.join(str(error).split())[:200]}", file=sys.stderr)
        return {}
    return {f"PEFT on {device}": step}


def _hf(case):
    return plan_models.with_layers(plan_models.KNOWN[case.model], case.layers)


def _model(case, device="cpu"):
    """A PEFT model of the case's shapes on `device`, in training mode without dropout."""
    import peft
    import torch
    import transformers

    hf = _hf(case)
    family, targets = hf["model_type"], ",".join(case.targets)
    if family not in MODULES or targets not in MODULES[family]:
        raise InputError(f"--peers runs {', '.join(MODULES)} with --targets=q,v or all-linear.")
    if family == "gpt2":
        config = transformers.GPT2Config(**hf, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    else:
        config = transformers.LlamaConfig(**hf, use_cache=False)
    with _quiet():
        with torch.device(device):
            dtype = torch.float32 if case.dtype == products.MIXED else getattr(torch, case.dtype)
            model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
        if case.remat:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        depth = config.num_hidden_layers
        options = peft.LoraConfig(
            layers_to_transform=case.last_layers and list(range(depth - case.last_layers, depth)),
            r=case.rank,
            lora_alpha=2 * case.rank,
            target_modules=MODULES[family][targets],
            fan_in_fan_out=family == "gpt2",
        )
        return peft.get_peft_model(model, options).train()


@contextlib.contextmanager
def _quiet():
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def _row_losses(logits, ids):
    """Mean next-token cross-entropy of each row [B]."""
    from torch.nn import functional

    flat = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return flat.view(ids.shape[0], -1).mean(1)


def _sgd(model):
    import torch

    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=benchmark_steps.RATE)


def _logits(case, model, ids):
    import torch

    with torch.autocast(ids.device.type, torch.bfloat16, enabled=case.dtype == products.MIXED):
        return model(input_ids=ids).logits


def _step(case, model, optimizer, ids):
    """A function that runs one step."""
    import torch

    def step():
        optimizer.zero_grad(set_to_none=True)
        _row_losses(_logits(case, model, ids), ids).sum().backward()
        optimizer.step()
        if ids.is_cuda:
            torch.cuda.synchronize()

    return step


def _plain(case, ids):
    model = _model(case, ids.device).to(ids.device)
    return _step(case, model, _sgd(model), ids)


def _opacus_hooks(case, ids):
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    with _quiet():
        model = GradSampleModule(_model(case), loss_reduction="sum", strict=False)
    return _step(case, model, DPOptimizer(_sgd(model), **_private(case)), ids)


def _private(case):
    return {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": case.batch, "loss_reduction": "sum"}


def _opacus_ghost(case, ids):
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    class Losses:
        reduction = "sum"

        def __call__(self, logits, ids):
            return _row_losses(logits, ids)

    with _quiet():
        model = GradSampleModuleFastGradientClipping(
            _model(case), loss_reduction="sum", strict=False, max_grad_norm=1.0, use_ghost_clipping=True
        )
    optimizer = DPOptimizerFastGradientClipping(_sgd(model), **_private(case))
    loss = DPLossFastGradientClipping(model, optimizer, Losses(), loss_reduction="sum")

    def step():  # Opacus' own stand-in for a loss, which has no sum
        optimizer.zero_grad(set_to_none=True)
        loss(_logits(case, model, ids), ids).backward()
        optimizer.step()

    return step


def _jax_privacy(case, ids):
    from jax_privacy import clipping, noise_addition

    model, params, adapter, batch = benchmark_steps.arguments(case)
    privatizer = noise_addition.gaussian_privatizer(stddev=1.0, prng_key=0)

    def step(params, adapter, state, batch):
        loss = benchmark_steps.loss_of(case)(model, params)
        grads = clipping.clipped_grad(lambda adapter, row: loss(adapter, row)[0], l2_clip_norm=1.0)(adapter, batch)
        noisy, state = privatizer.update(grads, state)
        return jax.tree.map(lambda a, g: a - benchmark_steps.RATE / case.batch * g, adapter, noisy), state

    state = [adapter, privatizer.init(adapter)]
    run = jax.jit(step, donate_argnums=(1, 2)).lower(params, *state, batch).compile()

    def call():
        state[:] = run(params, *state, batch)
        return state[0]

    return call


PEERS = {
    "PEFT, plain": _plain,
    "Opacus, hooks": _opacus_hooks,
    "Opacus, ghost": _opacus_ghost,
    "jax_privacy": _jax_privacy,
}
