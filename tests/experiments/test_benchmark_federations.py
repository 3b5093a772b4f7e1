"""What other simulators are given, and how they are timed and compared."""

import json
import pathlib
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.numpy

from dplora_jax.errors import InputError
from dplora_jax.privacy import clipping
from experiments.benchmark import federations, steps

CLIENTS, ROUNDS = 3, 2


@pytest.fixture
def case(tiny_bert):
    return steps.Case(str(tiny_bert), None, 4, 6, 2, ("q", "v"), False, "classification", "float32", False)


@pytest.fixture
def ours(case, quick_compile):
    return federations.Ours(case, CLIENTS, ROUNDS)


def distance(here, there):
    """The largest difference of two adapters."""
    return max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (here, there)), strict=True))


@pytest.mark.parametrize(("clips", "last_layers"), [(True, None), (False, None), (True, 1)])
def test_a_round_by_hand_on_the_rows_that_peers_are_given_comes_to_the_same(
    case, tmp_path, clips, last_layers, quick_compile
):
    case = case._replace(last_layers=last_layers)
    ours = federations.Ours(case, CLIENTS, ROUNDS)
    assert ours.made.model.start == (1 if last_layers else 0)
    federations.write(tmp_path, case, CLIENTS, ROUNDS, ours)
    rows = np.load(tmp_path / "rows.npz")
    model, params, _, _ = steps.arguments(case)
    adapter = ours.state.adapter
    loss = steps.loss_of(case)(model, params)
    for number in range(ROUNDS):
        uploads = []
        for client in range(CLIENTS):
            index = number * CLIENTS + client
            picked = rows["picked"][rows["starts"][index] : rows["starts"][index + 1]]
            assert ((picked >= client * 40) & (picked < (client + 1) * 40)).all()
            batch = {name: rows[name][picked] for name in ("input_ids", "labels")}
            batch["attention_mask"] = np.ones_like(batch["input_ids"])
            total, _, _ = clipping.clipped_grad_sum(loss, adapter, batch, 1.0 if clips else 1e9)
            uploads.append(jax.tree.map(lambda g: -federations.RATE * g / case.batch, total))
        adapter = jax.tree.map(lambda a, *moves: a + sum(moves) / CLIENTS, adapter, *uploads)
    state = ours(noise=False, clips=clips)
    assert distance(adapter, state.adapter) < 2e-4
    assert distance(ours.state.adapter, state.adapter) > 1e-3


def test_noise_changes_what_comes_out(ours):
    quiet, noisy = (ours(noise=noise).adapter for noise in (False, True))
    assert distance(quiet, noisy) > 1e-3


PEER = """
import subprocess, sys
child = subprocess.Popen(["sleep", "600"])
open(sys.argv[1] + "/child", "w").write(str(child.pid))
for line in sys.stdin:
    rounds, noise = line.split()
    if rounds == "7":
        raise SystemExit("no sevens")
    print("something else", flush=True)
    print("seconds 2.5", flush=True)
"""


@pytest.fixture
def peer(tmp_path, monkeypatch):
    monkeypatch.setattr(federations, "CLIENTS", tmp_path)
    (tmp_path / "with_pfl.py").write_text(PEER)
    made = federations.Peer(federations.Program("with_pfl", sys.executable, 1, False), tmp_path)
    yield made
    made.close()


def test_a_peer_tells_its_seconds_and_why_it_ended(peer):
    assert peer(3, 0.0) == 2.5
    with pytest.raises(InputError, match="with_pfl ended: no sevens"):
        peer(7, 0.0)


def test_a_peer_is_ended_with_what_it_started(peer, tmp_path):
    peer(3, 0.0)
    child = pathlib.Path("/proc", (tmp_path / "child").read_text(), "cmdline")
    assert b"sleep" in child.read_bytes()
    peer.close()
    deadline = time.monotonic() + 30
    while child.exists() and child.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_peer_that_cannot_be_started_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="with_pfl cannot be started by /nowhere/python: No such file or directory"):
        federations.Peer(federations.Program("with_pfl", "/nowhere/python", 1, False), tmp_path)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "head", None])
def test_a_peer_that_comes_to_another_adapter_is_refused(case, ours, peer, tmp_path, part):
    """By a tenth of the change of any of its parts."""
    config = steps.lora_config(case)
    state = ours(noise=False, clips=False).adapter
    trained = federations.named(ours.made.model, state, config)
    before = federations.named(ours.made.model, ours.state.adapter, config)
    for name in trained:
        if part is not None and part in name:
            trained[name] = trained[name] - 0.1 * (trained[name] - before[name])
    trained = {"adapted" * name.startswith(".") + name: np.ascontiguousarray(x) for name, x in trained.items()}
    safetensors.numpy.save_file(trained, tmp_path / "with_pfl.safetensors")
    if part is None:
        assert federations.compare(case, ours, peer, ROUNDS) < 1e-6
    else:
        with pytest.raises(InputError, match="with_pfl comes to another adapter: off by"):
            federations.compare(case, ours, peer, ROUNDS)


@pytest.mark.parametrize(
    ("task", "config"),
    [
        ("classification", SimpleNamespace(pooling="pooler")),
        ("classification", SimpleNamespace()),  # of a decoder
        ("language_model", SimpleNamespace(pooling="mean")),
    ],
)
def test_a_model_that_the_peers_do_not_have_is_refused(case, tmp_path, task, config):
    ours = SimpleNamespace(made=SimpleNamespace(model=SimpleNamespace(config=config)))
    with pytest.raises(InputError, match="cannot be compared: the peers classify by the mean of an encoder's states"):
        federations.write(tmp_path, case._replace(task=task), CLIENTS, ROUNDS, ours)


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_what_is_written_is_read_by_the_peers_names(case, ours, tmp_path, dtype):
    federations.write(tmp_path, case._replace(dtype=dtype), CLIENTS, ROUNDS, ours)
    setting = json.loads((tmp_path / "setting.json").read_text())
    assert setting == {
        "clients": 3, "rounds": 2, "batch": 4, "classes": 3, "clip_norm": 1.0, "rate": federations.RATE, "normalize": False,
        "mixed": dtype == "mixed",
    }  # fmt: skip
    names = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.encoder.layer.") for name in names)
    assert {*safetensors.numpy.load_file(tmp_path / "head.safetensors")} == {"weight", "bias"}
