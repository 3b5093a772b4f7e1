"""TensorBoard sees the public metrics, each once, however often they were written."""

import json

import pytest

from dplora_jax.errors import InputError
from experiments import run
from experiments.run import tensorboard
from tests.experiments.small_runs import arguments, lines_of

pytestmark = pytest.mark.usefixtures("quick_compile")


def scalars(folder):
    """{(name, round): value} of all events in `folder`; every one must be there once."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value
    return found


def test_each_number_of_each_round_is_a_scalar(tmp_path):
    lines = [
        {"round": t, "epsilon": [0.5 * t, t], "epsilon_max": t, "accuracy": t / 4, "release": "for release"}
        for t in range(3)
    ]
    for count in (2, 3):
        text = "".join(json.dumps(line) + "\n" for line in lines[:count])
        (tmp_path / "metrics.jsonl").write_text(text)
        tensorboard.write(tmp_path)
    found = scalars(tmp_path / "tensorboard")
    texts = {key for key in found if key[0].startswith("release/")}
    assert len(texts) == 3  # every round's mark
    assert len(found) - len(texts) == 12
    assert (found["accuracy", 2], found["epsilon/0", 1], found["epsilon/1", 2]) == (0.5, 0.5, 2)


def test_the_flag_writes_them_beside_the_run(tiny_bert, finance_table, tmp_path):
    assert run.main([*arguments(tiny_bert, finance_table, tmp_path), "--head_only", "--tensorboard"]) == 0
    found = scalars(tmp_path / "run" / "tensorboard")
    for line in lines_of(tmp_path / "run" / "metrics.jsonl"):
        assert found["epsilon_max", line["round"]] == pytest.approx(line["epsilon_max"])
        assert ("accuracy" in line) == (("accuracy", line["round"]) in found)


def test_a_package_that_is_missing_is_one_sentence(monkeypatch):
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install"):
        tensorboard.check()
