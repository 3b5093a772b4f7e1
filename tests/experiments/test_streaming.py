"""Records that stay on the host: the next round's rows are made while one runs, and a run comes to the same."""

import json
import threading
import types

import numpy as np
import pytest
import safetensors.numpy

from dplora_jax.config import RunConfig, replace
from dplora_jax.federation import streaming
from tests.experiments.small_runs import fit

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.slow
def test_a_streamed_run_comes_to_the_same_adapter_and_says_how_long_it_waited(tiny_bert, finance_table, tmp_path):
    command = [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=3", "--rounds=3", "--expected_batch_size=8", "--rank=2", "--noise_multiplier=1",
        "--delta=1e-3", "--eval_every=0", "--seed=3",
    ]  # fmt: skip
    fit([*command, f"--workdir={tmp_path / 'there'}"])
    made = fit([*command, "--stream", f"--workdir={tmp_path / 'streamed'}"])
    assert "The devices waited " in "".join(made.federation.clock.in_words())
    there, streamed = (
        safetensors.numpy.load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("there", "streamed")
    )
    for name, value in there.items():
        np.testing.assert_allclose(streamed[name], value, atol=1e-5)
    lines = (tmp_path / "streamed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2, 3]


def test_the_next_item_is_made_while_the_caller_works_and_no_further():
    made, begun = [], [threading.Event() for _ in range(4)]

    def make(item):
        begun[item].set()
        made.append(item)
        return item * 10

    for number, (value, waited) in enumerate(streaming.ahead(make, range(3))):
        assert value == number * 10
        assert waited >= 0
        if number < 2:
            assert begun[number + 1].wait(60)
        assert not begun[min(number + 2, 3)].is_set()
    assert made == [0, 1, 2]


def test_a_fault_while_making_rows_is_raised_where_they_are_asked_for():
    with pytest.raises(ZeroDivisionError):
        list(streaming.ahead(lambda item: 1 / item, [1, 0]))


def test_records_are_streamed_where_they_would_take_too_much_of_a_device():
    table = {"input_ids": np.zeros((3, 100), np.int32), "labels": np.zeros(3, np.int32)}
    device = lambda limit: types.SimpleNamespace(memory_stats=lambda: limit and {"bytes_limit": limit})  # noqa: E731
    grid = lambda limit: types.SimpleNamespace(local_devices=[device(limit)], devices=np.zeros(2))  # noqa: E731
    auto = RunConfig()
    bytes_a_device = 404 * 1000 / 2
    assert streaming.wanted(auto, grid(4 * bytes_a_device - 1), table, 1000)
    assert not streaming.wanted(auto, grid(4 * bytes_a_device), table, 1000)
    assert not streaming.wanted(auto, grid(None), table, 1000)  # a device that does not tell: a CPU
    assert streaming.wanted(replace(RunConfig(), stream=True), grid(None), table, 1)
