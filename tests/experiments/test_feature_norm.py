"""A run with --feature_norm: measured on public text alone, and gone from what is released."""

import pathlib
import shutil

import numpy as np
import pytest

from dplora_jax import lora, models, peft
from dplora_jax.federation import mesh, methods
from dplora_jax.models import features
from experiments import run
from tests.conftest import write_tokenizer
from tests.experiments.public_measures import arguments, measured, measured_anew, relabelled
from tests.experiments.small_runs import fit

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def command(tiny_bert, finance_table, tmp_path):
    return [*arguments(tiny_bert, finance_table, tmp_path), "--feature_norm=4"]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], id="fedavg"),
        pytest.param(["--aggregation=fedex", "--local_steps=2"], id="fedex", marks=pytest.mark.slow),
        pytest.param(["--aggregation=flora"], id="flora", marks=pytest.mark.slow),
        pytest.param(["--aggregation=fedsa"], id="fedsa", marks=pytest.mark.slow),
        pytest.param(["--head_only"], id="head_only", marks=pytest.mark.slow),
    ],
)
def test_the_released_adapter_says_the_same_of_plain_features(command, tiny_bert, tmp_path, more, quick_compile):
    federation = fit([*command, *more]).federation
    prepared, state = federation.prepared, federation._state
    model, base = models.from_pretrained(tiny_bert, num_labels=2)
    rows = {"input_ids": np.arange(40, dtype=np.int32).reshape(8, 5) % 20, "attention_mask": np.ones((8, 5), bool)}
    within = prepared.model.prefix(base, rows, prepared.model.start)
    params = {**base, features.KEY: mesh.fetch(prepared.params[features.KEY])}
    folders = ["adapter"] if "fedsa" not in "".join(more) else ["adapter/clients/0", "adapter/clients/1"]
    for client, folder in enumerate(folders):
        adapter, _ = peft.load(tmp_path / "run" / folder, model, base)
        trained, shifted = state.adapter, params
        if "fedsa" in "".join(more):
            own = {name: b[client] for name, b in state.own.items()}
            trained = methods.BY_NAME["fedsa"].begin(trained, own)
        if state.residual:
            shifted = lora.shifted(model, params, state.residual)
        expected = prepared.model.apply(shifted, {**rows, "hidden": within}, trained)
        np.testing.assert_allclose(model.apply(base, rows, adapter), expected, rtol=2e-3, atol=2e-3)


def test_a_resumed_run_keeps_the_centre_that_its_head_was_trained_on(command, finance_table, tmp_path):
    kept, _, resumed, fresh = measured_anew(command, finance_table, tmp_path)
    np.testing.assert_array_equal(resumed["center"], np.float32(kept["federation"]["measured"]["center"]))
    assert np.abs(fresh["center"] - resumed["center"]).max() > 1e-3


def test_the_centre_is_of_public_text_alone(command, finance_table, tmp_path):
    def center(name, **changes):
        found = measured(command, finance_table, tmp_path / name, **changes)
        return np.append(found["center"], found["scale"])

    plain, sales = center("plain"), lambda rows: rows.replace("profit", "sales")
    np.testing.assert_array_equal(center("train", train=sales), plain)
    np.testing.assert_array_equal(center("labels", test=relabelled), plain)
    assert np.abs(center("test", test=sales) - plain).max() > 1e-3


def test_where_nothing_can_be_centred_it_is_refused(command, finance_table, golden, tmp_path, capsys):
    (tmp_path / "train.csv").write_text((finance_table / "train.csv").read_text())
    write_tokenizer(shutil.copytree(golden / "variants" / "gpt2_untied", tmp_path / "gpt2"))
    bare = [*command, f"--data_dir={tmp_path}", "--labels=good,bad", "--eval_every=0"]
    assert run.main(bare) == 2
    assert "--feature_norm needs a public test set" in capsys.readouterr().err
    for more, words in (
        (["--feature_norm=-1"], "0 or more"),
        (["--trust=none", "--clip_norm=inf"], "--clip_norm=inf"),
        ([f"--model={tmp_path / 'gpt2'}", "--objective=classifier"], "head has a bias"),
    ):
        assert run.main([*command, *more]) == 2
        assert words in capsys.readouterr().err
    assert not pathlib.Path(tmp_path / "run" / "privacy_ledger.jsonl").exists()
