"""What the benchmark counts, prints and keeps; its times are nobody's to test."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax.errors import InputError
from experiments.benchmark import command as benchmark
from experiments.benchmark import roofline
from experiments.benchmark import steps as benchmark_steps
from experiments.benchmark import table as benchmark_table
from experiments.plan import flops

A, B = jnp.ones((3, 5)), jnp.ones((5, 7))
CASE = benchmark_steps.Case("gpt2", 2, 4, 16, 8, ("q", "v"), False, "language_model", "bfloat16", False)


def test_products_in_loops_count_as_often_as_they_run_and_dead_ones_do_not():
    def twice(a, b):
        dead = a @ b @ b.T
        del dead
        return jax.lax.scan(lambda x, _: (x @ b @ b.T, None), a, None, 2)[0]

    assert flops.count(twice, A, B) == 2 * (2 * 3 * 5 * 7 * 2)
    assert flops.count(jax.jit(lambda a, b: jnp.einsum("ij,jk->ik", a, b)), A, B) == 2 * 3 * 5 * 7
    exact = lambda a, b: a @ b + jnp.dot(a, b, precision="highest")  # noqa: E731
    assert flops.count(exact, A, B) == 2 * flops.count(exact, A, B, exact=True) == 4 * 3 * 5 * 7
    assert flops.count(lambda x, a, b: jax.lax.cond(x, lambda: (a @ b).sum(), lambda: 0.0), True, A, B) == 210


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "broadcast", "ghost"])
def test_what_is_counted_in_a_step_is_what_is_compiled(name):
    """Of one layer, whose loop XLA takes apart: its own analysis, which counts a loop's body once, then has all products."""
    case = benchmark_steps.Case("bert-base", 1, 4, 32, 64, ("q", "v"), False, "classification", "float32", False)
    model, params, adapter, batch = benchmark_steps.arguments(case)
    step = benchmark_steps.functions(case, model, ["broadcast", "ghost"])[name]
    compiled = jax.jit(step).lower(params, adapter, batch).compile()
    assert flops.count(step, params, adapter, batch) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.1)


def found(auto, broadcast, ghost, plain=1.0):
    row = lambda seconds: {"seconds": [seconds * t for t in (1, 1, 2)], "flops": 100, "peak": 10 * seconds}  # noqa: E731
    steps = {"plain": plain, "auto": auto, "broadcast": broadcast, "ghost": ghost, "evaluation": 0.3}
    rows = {name: row(value) | {"compile_seconds": 1.0, "temporaries": 1} for name, value in steps.items()}
    return rows | {"matmul": {"seconds": [0.5, 0.5, 1.0], "flops": 100}}


def test_a_table_shows_ratios_of_the_same_turn_and_whether_auto_was_the_fastest():
    cells = [({"rank": "8"}, found(1.04, 1.0, 1.5)), ({"rank": "64"}, found(1.3, 1.2, 1.1))]
    text = benchmark_table.markdown(cells)
    assert (
        "| rank | plain s | auto: time, memory | broadcast: time, memory | ghost: time, memory | fastest | plain of matmul |"
        in text
    )
    assert "| 8 | 1.00 | 1.040, 1.040 | 1.000, 1.000 | 1.500, 1.500 | broadcast | 0.50 |" in text
    assert "in 1 of 2 cells" in text
    lines = list(benchmark_table.lines(CASE, cells[0][1]))
    assert lines[1].split()[:5] == ["plain", "1.000", "1.000", "1.000", ".."]
    assert "matrix product runs at" in lines[-1]


def test_peers_come_with_ours_over_theirs_and_are_no_forms():
    cell = found(1.0, 1.0, 1.5) | {
        "Opacus, hooks": {"seconds": [3.0, 3.0, 6.0]},
        "PEFT, plain": {"seconds": [2.0, 2.0, 4.0]},
    }
    text = benchmark_table.markdown([({"rank": "8"}, cell)])
    assert "auto / Opacus, hooks, examples/s" in text
    assert "| broadcast | 0.50 | 3.00 | 2.00 |" in text
    lines = "\n".join(benchmark_table.lines(CASE, cell))
    assert "auto does 3.00 (3.00 .. 3.00) times the examples a second of Opacus, hooks" in lines
    assert "plain does 2.00" in lines


@pytest.mark.slow
def test_a_sweep_writes_each_cell_once_and_a_plot(quick_compile, tiny_bert, tmp_path, capsys, monkeypatch):
    out = tmp_path / "cells.jsonl"
    command = [f"--model={tiny_bert}", "--batch=2", "--length=8", "--repeats=3", "--forms=auto,vmap", f"--out={out}"]
    assert benchmark.main([*command, "--vary=rank=2|3"]) == 0
    first = capsys.readouterr().out
    assert re.search(r"in [012] of 2 cells", first)
    cells = [json.loads(line) for line in out.read_text().splitlines()]
    assert [cell["case"][4] for cell in cells] == [2, 3]
    assert set(cells[0]["found"]) == {"plain", "auto", "vmap", "evaluation", "matmul"}
    assert all(len(row["seconds"]) == 3 for row in cells[0]["found"].values())
    assert (tmp_path / "cells.svg").read_text().lstrip().startswith("<?xml")
    monkeypatch.setattr(benchmark_steps, "measure", lambda *_: pytest.fail("measured again"))
    assert benchmark.main([*command, "--vary=rank=2|3"]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.slow
def test_rounds_are_measured_pooled_and_apart(quick_compile, tiny_bert, capsys):
    command = [f"--model={tiny_bert}", "--batch=4", "--length=8", "--rank=2", "--repeats=3"]
    assert benchmark.main([*command, "--measure=round", "--clients=1,3"]) == 0
    _, one, three = capsys.readouterr().out.splitlines()
    assert one.split()[0] == "1"
    rows = [int(word.strip(",")) for word in three.split()[1:4]]
    assert rows[0] < rows[1]  # fewer rows where they are pooled


@pytest.mark.slow
def test_a_profile_is_a_trace_and_names_what_takes_the_time(quick_compile, tiny_bert, tmp_path, capsys):
    command = [f"--model={tiny_bert}", "--batch=2", "--length=8", "--rank=2", "--repeats=3", "--forms=auto"]
    assert benchmark.main([*command, f"--profile={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert f"plain: trace in {tmp_path / 'plain'}" in out
    assert list(pathlib.Path(tmp_path, "auto").glob("**/perfetto_trace.json.gz"))
    assert " ms " in out


def test_a_roofline_takes_no_weights_and_exact_products_are_the_noisy_steps_alone():
    plain, noisy = roofline.estimate(CASE, "plain"), roofline.estimate(CASE, "auto")
    assert plain[1] == 0 < noisy[1] < 0.05 * noisy[0]
    base, trained = 2 * (124439808 - 10 * 7087872), 4 * 2 * 8 * (768 + 2304)
    assert plain[2] > 2 * base + 3 * trained
    assert noisy[2] > plain[2] + 2 * 4 * 4 * 8 * (768 + 2304)  # rows' gradients: 4 rows, and float32
    frozen = roofline.estimate(CASE._replace(freeze_a=True), "plain")
    assert frozen[3] == pytest.approx(plain[3] * 2304 / (768 + 2304))
    assert plain[3] == pytest.approx(2 * 7 / 8 * trained)
    lines = list(roofline.lines(CASE, ["h100", "v5e"]))
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--forms=quick"], "--forms=quick is not known: auto, vmap, broadcast, ghost"),
        (["--vary=speed=1|2"], "needs FLAG=VALUE"),
        (["--chips=abacus", "--measure=roofline", "--model=gpt2"], "--chips=abacus is not known: h100, h200, v5e"),
        (["--model=gpt2", "--layers=1", "--batch=1", "--length=4", "--peers", "--targets=o"], "--peers"),
        (["--repeats=1"], "repeats"),
    ],
)
def test_a_mistake_is_one_sentence(argv, words, capsys):
    assert benchmark.main(argv) == 2
    captured = capsys.readouterr().err
    assert words in captured
    assert len(captured.strip().splitlines()) == 1


def test_freed_memory_is_kept():
    """The second of two large arrays causes hardly a page fault, where the first one was freed."""
    program = """
import resource, sys
import numpy as np
from experiments.cli import allocator
if sys.argv[1] == "keep":
    allocator.keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for turn in range(3):
    before = faults()
    array = np.ones(30_000_000)
    print(faults() - before)
    del array
"""
    root = pathlib.Path(__file__).parents[2]
    faults = {}
    for how in ("keep", "do not"):
        command = [sys.executable, "-c", program, how]
        out = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True).stdout
        faults[how] = [int(word) for word in out.split()]
    assert faults["keep"][2] < 0.1 * faults["do not"][2]


def test_peers_without_pytorch_are_refused(monkeypatch):
    from experiments.benchmark import peers as benchmark_peers

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[bench\]'"):
        benchmark_peers.calls(CASE._replace(dtype="float32"))
    with pytest.raises(InputError, match="language models"):
        benchmark_peers.calls(CASE._replace(task="classification"))


def test_interleaving_takes_turns_after_a_warm_up():
    calls = []
    times = benchmark_steps.interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, 2)
    assert calls == ["a", "b"] * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    assert isinstance(times["a"], np.ndarray)
