"""The GPU check, rehearsed on a CPU at small shapes: what it writes, part by part, and what it says of parts that fail."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax.errors import InputError
from experiments import gpu_check
from experiments.gpu_check import checks, speed


def test_the_rehearsal_writes_each_part_and_prints_a_table(tmp_path, capfd):
    out = tmp_path / "found.json"
    assert gpu_check.main(["--small", "--parts=environment,noise", f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert found["small"]
    assert {name: part["ended"] for name, part in found["parts"].items()} == {"environment": "done", "noise": "done"}
    assert found["parts"]["environment"]["lines"][0]["device"] == "cpu"
    assert [line["passed"] for line in found["parts"]["noise"]["lines"]] == [True] * 8
    assert "share of equal bits" in capfd.readouterr().out


def test_a_part_whose_time_is_up_keeps_its_lines_and_the_others_go_on(tmp_path, monkeypatch):
    out = tmp_path / "found.json"
    monkeypatch.setitem(gpu_check.PARTS, "clipping", (0.1, {}))
    monkeypatch.setattr(gpu_check, "CPU", {"JAX_PLATFORMS": "none_such"})
    assert gpu_check.main(["--small", "--parts=clipping,noise", f"--out={out}"]) == 1
    parts = json.loads(out.read_text())["parts"]
    assert parts["clipping"]["ended"] == "cut off after 0 s"
    assert parts["noise"]["ended"].startswith("failed: ")
    assert "none_such" in parts["noise"]["ended"]


def test_all_of_it_takes_eight_minutes_at_most():
    assert sum(seconds for seconds, _ in gpu_check.PARTS.values()) <= 480
    assert set(gpu_check.PARTS) == set(checks.PARTS | speed.PARTS)


def test_an_unknown_part_is_one_sentence():
    with pytest.raises(InputError, match="--parts=nose is not known"):
        gpu_check.main.__wrapped__(["--parts=nose"])


@pytest.mark.parametrize("form", checks.FORMS)
def test_clipping_passes_beside_float64(form):
    line = checks._chosen("float32", form, True, "highest")
    assert line["passed"]
    assert 0.9 < line["largest move"] <= 1 + checks.ROUNDING


def test_a_norm_that_is_too_small_does_not_pass():
    def run(clip_norm, weights):  # a row of length 2, of which a norm of 1 is told
        factor = min(1.0, clip_norm)
        return {"a": np.asarray([2.0]) * factor * weights.max()}, np.ones(len(weights)) * weights, None

    assert not checks._verdict(run, 2, 0.5, 0.0, 1.0)["passed"]


def test_attention_of_the_library_is_ours_on_a_cpu():
    lines = [line for line in speed.attention(True, None) if "refused" not in line]
    assert {line["form"] for line in lines} == {"ours", "xla"}
    assert all(line["output off"] < 0.05 for line in lines)  # bfloat16's rounding


@pytest.mark.slow
def test_the_whole_rehearsal_passes(tmp_path):
    out = tmp_path / "found.json"
    assert gpu_check.main(["--small", f"--out={out}"]) == 0
    parts = json.loads(out.read_text())["parts"]
    assert list(parts) == list(gpu_check.PARTS)
    (cell,) = parts["gpt2"]["lines"]
    assert 0 < cell["noisy / plain"][0] <= cell["noisy / plain"][2]
    assert cell["plain, least s"] < cell["plain s"]
    assert jnp.isfinite(cell["noisy GB"])
