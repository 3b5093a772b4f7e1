"""Rounds of a federation, beside those of other simulators: Flower's engine with clients of PEFT and Opacus, and pfl-research
with its local differential privacy, which clips no record's gradient.

    python -m experiments.benchmark --measure=federation --model=gpt2 --layers=2 --batch=8 --length=32 --clients=5,50 \\
        --peers --flower_python=FLOWER/bin/python --pfl_python=PFL/bin/python

The peers need environments of their own, with torch, transformers, peft and opacus: `pip install 'flwr[simulation]'` in one, `pip
install pfl` in the other. They classify by the mean of an encoder's states, or train a decoder's next tokens. All start from the
same weights, and each client takes the same rows in the same round. First all run without noise, and what comes out is compared.
Then rounds with noise are timed in turn. A turn of ours is the compiled rounds and their adapter on the host: no keys are drawn
in it, and there is no ledger and no checkpoint (the peers have neither). With --last_layers the layers below have run before it,
once for every record; the table says in how many seconds.

Letters: K clients, R rounds of a turn, B rows that a client expects in a step.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import signal
import subprocess
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dplora_jax import peft
from dplora_jax.errors import InputError
from dplora_jax.federation import mesh, round
from dplora_jax.files import to_json
from dplora_jax.models import hf_checkpoint, pretrained, products
from dplora_jax.privacy import clipping, secrets
from experiments.benchmark import rounds as benchmark_rounds
from experiments.benchmark import steps as benchmark_steps
from experiments.plan import models as plan_models
from experiments.text.tables import Table

ALLOWED = 1e-2  # how far a peer's change of the adapter may be from ours, as a share of its norm
RATE = 10.0  # of the clients' SGD: changes are large beside the rounding of what was there
CLIENTS = pathlib.Path(__file__).parent / "peer_clients"
SETTINGS = {
    "PYTHONPATH": str(CLIENTS),  # of Ray's actors too
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "PFL_PYTORCH_DEVICE": "cpu",
}
HEAD = {"bias": "head.bias", "kernel": "head.weight"}  # as peer_clients/torch_client.py names a classifier's head


class Program(NamedTuple):
    """A program of `peer_clients`: the interpreter of its environment, the threads of each of its clients, and whether it clips
    every row's gradient."""

    name: str
    python: str
    threads: int
    clips: bool


class Ours:
    """Rounds of this project's program, R of them in each call: with or without noise, and with clipping or without."""

    def __init__(self, case, clients, rounds):
        records = benchmark_rounds.RECORDS * case.batch
        made, self.grid, (state, params, placed, data, _) = benchmark_rounds.federation(
            case, clients, records, case.batch, clients, True, _at_a_time(case), RATE
        )
        keys = secrets.round_keys(secrets.from_seed(0, clients), range(1, rounds + 1), 0)
        keys = mesh.place_keys(self.grid, keys, placed.size.shape[0])
        self.made, self.rest = made, (params, placed, data, keys)
        self.state = made.init(_moved(state.adapter))
        self.programs = {}

    def picked(self):
        """(the rows that join, round by round and in it client by client; where each client's begin: those of client k in round r
        at entry r K + k)."""
        _, clients, data, keys = self.rest
        local = self.made.local
        picks = jax.jit(jax.vmap(lambda keys: local.batches.first_picks(local, data, clients, keys)[1:]))
        rows, weights = map(np.asarray, picks(keys))  # [R, K, capacity]
        capacity = rows.shape[-1]
        pairs = zip(rows.reshape(-1, capacity), weights.reshape(-1, capacity) > 0, strict=True)
        taken = [rows[joins] for rows, joins in pairs]
        return np.concatenate(taken), np.cumsum([0, *map(len, taken)])

    def __call__(self, noise=True, clips=True):
        """The state after R rounds from the start."""
        params, clients, data, keys = self.rest
        made = self.made
        if not clips:
            local = dataclasses.replace(made.local, clipper=clipping.Clip(1e9))
            made = dataclasses.replace(made, local=local)
        if not noise:
            clients = clients._replace(noise_std=jnp.zeros_like(clients.noise_std))
        arguments = (jax.tree.map(jnp.copy, self.state), params, clients, data, keys)
        if clips not in self.programs:
            self.programs[clips] = round.make(made, self.grid).lower(*arguments).compile()
        return jax.device_get(self.programs[clips](*arguments)[0])


def _at_a_time(case):
    """Rows that are taken at a time: more gain nothing on a CPU."""
    return max(case.batch, 32)


def _moved(adapter):
    """`adapter` with a random B, without which A would have no gradient to compare."""
    draws = np.random.default_rng(1)
    layers = {
        target: pair.replace(b=0.02 * draws.standard_normal(pair.b.shape, np.float32))
        for target, pair in adapter["layers"].items()
    }
    return jax.tree.map(jnp.asarray, adapter | {"layers": layers})


class Peer:
    """A Program at work on what `write` laid down in `folder`: it waits for turns."""

    def __init__(self, program, folder):
        self.program, self.folder, name = program, folder, program.name
        command = [program.python, str(CLIENTS / f"{name}.py"), str(folder), str(program.threads)]
        # Files and no pipes: what the program started may hold a pipe open when the program has ended.
        self.answers, self.errors = ((folder / f"{name}.{kind}").open("w+") for kind in ("answers", "errors"))
        files = {"stdin": subprocess.PIPE, "stdout": self.answers, "stderr": self.errors, "text": True}
        self.reader = (folder / f"{name}.answers").open()
        try:
            self.process = subprocess.Popen(command, env=os.environ | SETTINGS, start_new_session=True, **files)
        except OSError as error:
            self._close_files()
            raise InputError(f"{name} cannot be started by {program.python}: {error.strerror}.") from None

    def __call__(self, rounds, noise):
        """The seconds of `rounds` rounds with the noise multiplier `noise`. Raises InputError where the program ends."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{rounds} {noise}\n")
            self.process.stdin.flush()
        ended = False
        while not ended:
            ended = self.process.poll() is not None
            for line in self.reader.readlines():
                if line.startswith("seconds "):
                    return float(line.split()[1])
            time.sleep(0.01)
        self.errors.seek(0)
        said = [line for line in self.errors.read().splitlines() if line.strip()]
        raise InputError(f"{self.program.name} ended: {said[-1] if said else 'without a word'}")

    def trained(self):
        """{name: array} of what its last rounds came to."""
        return safetensors.numpy.load_file(self.folder / f"{self.program.name}.safetensors")

    def close(self):
        """End it, and what it started."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()
        self.process.stdin.close()
        self._close_files()

    def _close_files(self):
        for file in (self.answers, self.reader, self.errors):
            file.close()


def table(case, counts, rounds, repeats, peers):
    """Lines: for each K of `counts`, seconds of a round of ours, and how many times that each of `peers` (Programs) takes:
    medians of `repeats` turns of R = `rounds` rounds, interleaved, with quartiles."""
    body, columns = [], [peer.name for peer in peers]
    for count in counts:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            folder, ours = pathlib.Path(folder), Ours(case, count, rounds)
            if peers:
                write(folder, case, count, rounds, ours)
            turns, off = {"ours": functools.partial(_seconds, ours)}, []
            for program in peers:
                peer = Peer(program, folder)
                stack.callback(peer.close)
                off.append(compare(case, ours, peer, rounds))
                turns[program.name] = functools.partial(peer, rounds, 1.0)
            times = {name: [] for name in turns}
            for repeat in range(repeats + 1):
                for name, turn in turns.items():
                    time.sleep(benchmark_steps.REST)
                    seconds = turn()
                    if repeat:  # the first is a warm-up
                        times[name].append(seconds / rounds)
        times = {name: np.array(values) for name, values in times.items()}
        row = [str(count), f"{np.median(times['ours']):.3f}"]
        for name, distance in zip(columns, off, strict=True):
            low, middle, high = np.quantile(times[name] / times["ours"], [0.25, 0.5, 0.75])
            row += [f"{middle:.2f} ({low:.2f} .. {high:.2f})", f"{distance:.1e}"]
        row += [f"{_frozen_seconds(case, count):.3f}"] if case.last_layers else []
        body.append(row)
    head = ["K", "ours, s a round", *(text for name in columns for text in (f"{name} / ours", "off by"))]
    yield Table(head + ["frozen layers before it, s"] * bool(case.last_layers), body).text()


def _frozen_seconds(case, clients):
    """Seconds that all rows of `clients` clients take through the frozen layers, once in a whole run."""
    model, params, _, _ = benchmark_steps.arguments(case._replace(batch=1))
    rows = benchmark_rounds.random_rows(case, model, clients * benchmark_rounds.RECORDS * case.batch)
    _, through = benchmark_rounds.frozen(case, model, params, len(rows["input_ids"]))
    through(rows)  # compiles
    return _seconds(lambda: through(rows))


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def write(folder, case, clients, rounds, ours):
    """Lay down in `folder` what the peers read. Raises InputError for a model that they do not have."""
    model = ours.made.model
    pooling = getattr(model.config, "pooling", None)  # of an encoder
    if pooling != ("mean" if case.task == "classification" else None):
        raise InputError(
            f"--model={case.model} cannot be compared: the peers classify by the mean of an encoder's states (as in "
            "all-MiniLM-L6-v2), or train a decoder with --task=language_model."
        )
    adapter, params = ours.state.adapter, ours.rest[0]
    hf = plan_models.KNOWN.get(case.model) or pretrained.config(pretrained.locate(case.model))
    classes = benchmark_steps.CLASSES if case.task == "classification" else 0
    (folder / "base").mkdir()
    hf_checkpoint.save(folder / "base", model, params, plan_models.with_layers(hf, case.layers))
    peft.save(folder / "adapter", model, {"layers": adapter["layers"]}, benchmark_steps.lora_config(case))
    if classes:  # the peers' model is the encoder alone
        path = folder / "adapter" / "adapter_model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        safetensors.numpy.save_file({name.replace(f".{model.base}.", "."): x for name, x in tensors.items()}, path)
        head = {name.removeprefix("head."): np.ascontiguousarray(value) for name, value in _head(adapter).items()}
        safetensors.numpy.save_file(head, folder / "head.safetensors")
    picked, starts = ours.picked()
    rows = benchmark_rounds.random_rows(case, model, clients * benchmark_rounds.RECORDS * case.batch)
    del rows["attention_mask"]  # every token is attended
    np.savez(folder / "rows.npz", picked=picked, starts=starts, **rows)
    setting = {
        "clients": clients, "rounds": rounds, "batch": case.batch, "classes": classes, "clip_norm": 1.0,
        "rate": RATE, "normalize": getattr(model.config, "normalize", False), "mixed": case.dtype == products.MIXED,
    }  # fmt: skip
    (folder / "setting.json").write_text(to_json(setting))


def compare(case, ours, peer, rounds):
    """How far the peer's change of A, of B or of the head is from ours after R rounds without noise, as a share of the norm of
    ours: the largest of these. Raises InputError where it is more than ALLOWED."""
    peer(rounds, 0.0)
    state = ours(noise=False, clips=peer.program.clips)
    config, name = benchmark_steps.lora_config(case), peer.program.name
    before, after = (named(ours.made.model, tree, config) for tree in (ours.state.adapter, state.adapter))
    theirs = {_ending(array): value for array, value in peer.trained().items()}
    if before.keys() != theirs.keys():
        raise InputError(f"{name} trains other arrays: {min(before.keys() ^ theirs.keys())} is not in both.")
    off = 0.0
    for part in {_part(array) for array in before}:
        arrays = [array for array in before if _part(array) == part]
        moved = sum(np.square(after[array] - before[array]).sum() for array in arrays) ** 0.5
        off = max(off, sum(np.square(after[array] - theirs[array]).sum() for array in arrays) ** 0.5 / moved)
    if not off <= ALLOWED:
        raise InputError(f"{name} comes to another adapter: off by {off:.2g} of the change.")
    return off


def named(model, tree, config):
    """{name: array} of an adapter, under the ends of the peers' names."""
    layers = peft.to_state_dict(model, {"layers": tree["layers"]}, config)
    return {_ending(name): value for name, value in layers.items()} | _head(tree)


def _head(tree):
    """{name: array} of an adapter's head, as the peers have it."""
    return {HEAD[part]: np.asarray(value).T for part, value in tree.get("head", {}).items()}


def _part(name):
    """lora_A, lora_B or head, of a name of `named`."""
    return name.split(".")[-2] if "lora" in name else "head"


def _ending(name):
    """A name from the layer on, without what each program puts before and PEFT's name of the adapter."""
    layered = re.search(r"\.(?:layers?|h)\..*", name.replace(".default.", "."))
    return layered[0] if layered else name
