"""A run with --feature_norm: measured on public text alone, and gone from what is released."""

import json
import shutil

import numpy as np
import pytest

from dplora_jax import lora, models, peft
from dplora_jax.data import demos, encoding
from dplora_jax.errors import InputWarning
from dplora_jax.federation import mesh, methods
from dplora_jax.finetuning import public_text, setup
from dplora_jax.models import features
from experiments import cli, run
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


def test_without_a_public_test_set_the_centre_is_of_embedded_text(command, finance_table, tmp_path):
    """Nor where it has hardly any records."""
    command = [*command, "--labels=good,bad", "--eval_every=0"]

    def found(name, change=lambda rows: rows, test_lines=0):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.csv").write_text(change((finance_table / "train.csv").read_text()))
        if test_lines:
            lines = (finance_table / "test.csv").read_text().splitlines()[:test_lines]
            (tmp_path / name / "test.csv").write_text("\n".join(lines))
        return setup.prepare(cli.parse([*command, f"--data_dir={tmp_path / name}"]))

    sales = lambda rows: rows.replace("profit", "sales")  # noqa: E731
    with pytest.warns(InputWarning, match="centred by embedded finance headlines, for lack of 20"):
        plain, other, tiny = found("plain"), found("other", sales), found("tiny", test_lines=2)
    center, scale = (np.asarray(plain.federation.params[features.KEY][part]) for part in ("center", "scale"))
    for job in other, tiny:
        np.testing.assert_array_equal(job.federation.params[features.KEY]["center"], center)
        np.testing.assert_array_equal(job.federation.params[features.KEY]["scale"], scale)
    model, base = models.from_pretrained(plain.federation.config.base.name, num_labels=2)
    rows = encoding.classification(plain.tokenizer, demos.load("finance_demo", 0).test, max_length=8)
    pooled = np.asarray(model.features(base, rows))[
        np.unique(np.linspace(0, 799, public_text.FEATURE_ROWS).astype(int))
    ]
    np.testing.assert_allclose(center, pooled.mean(0), rtol=1e-4)
    np.testing.assert_allclose(np.square((pooled - center) * scale).sum(1).mean(), 16, rtol=1e-3)
    assert run.main([*command, f"--data_dir={tmp_path / 'plain'}"]) == 0
    assert "norm 4, by public text" in (tmp_path / "run" / "config.json").read_text()


def test_what_is_not_clipped_is_scaled_to_norm_1_at_most(command):
    scale = lambda *more: float(setup.prepare(cli.parse([*command, *more])).federation.params[features.KEY]["scale"])  # noqa: E731
    np.testing.assert_allclose(scale("--trust=none", "--clip_norm=inf"), scale() / 4, rtol=1e-6)


def test_a_model_without_such_a_head_is_left_as_it_is(command, golden, tmp_path, capsys):
    write_tokenizer(shutil.copytree(golden / "variants" / "gpt2_untied", tmp_path / "gpt2"))
    assert run.main([*command, f"--model={tmp_path / 'gpt2'}", "--objective=classifier"]) == 0
    assert "--feature_norm=4 changes nothing here" in capsys.readouterr().err
    described = json.loads((tmp_path / "run" / "config.json").read_text())["federation"]
    assert not any("centred" in words for words in described["method"])
    assert features.KEY not in described


def test_features_have_no_norm_below_0(command, capsys):
    assert run.main([*command, "--feature_norm=-1"]) == 2
    assert "0 or more" in capsys.readouterr().err
