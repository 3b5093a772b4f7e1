"""The main job on what a person already has: other families, few-bit bases, bfloat16, mixed numbers."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from dplora_jax import models, peft
from dplora_jax.models import products
from experiments import run
from tests.conftest import GOLDEN, write_tokenizer
from tests.experiments.small_runs import adapter_of, fit

pytestmark = pytest.mark.usefixtures("quick_compile")


def job(base, table, tmp_path, *extra):
    """The flags of a two-round run on a copy of the golden model `base` with the tiny tokenizer beside it."""
    place = tmp_path / "base"
    shutil.copytree(GOLDEN / base, place)
    write_tokenizer(place)
    return [
        f"--model={place}", "--dataset=csv", f"--data_dir={table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=2", "--rounds=2", "--expected_batch_size=8", "--rank=2", "--epsilon=8", "--delta=1e-3",
        "--client_lr=0.1", "--head_lr=1", "--eval_every=2", "--targets=q,v", "--objective=classifier",
        f"--workdir={tmp_path / 'run'}", *extra,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("base", "extra"),
    [
        pytest.param("variants/gpt2_untied", ("--remat",), id="remat", marks=pytest.mark.slow),
        pytest.param("variants/gpt2_untied", ("--last_layers=1", "--freeze_a"), id="frozen layers below"),
        pytest.param(
            "variants/qwen2",
            ("--dtype=bfloat16", "--quantize=nf4"),
            id="nf4 in bfloat16",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "variants/llama_mqa",
            ("--quantize=int8", "--targets=all-linear"),
            id="int8, every matrix",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_decoder_becomes_a_classifier_and_leaves_an_adapter_that_peft_reads(base, extra, finance_table, tmp_path):
    fit(job(base, finance_table, tmp_path, *extra))
    folder = tmp_path / "run"
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    tensors = safetensors.numpy.load_file(folder / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.score.weight"].any()
    assert all(np.isfinite(value).all() for value in tensors.values())
    model, params = models.from_pretrained(tmp_path / "base", num_labels=2)
    adapter, _ = peft.load(folder / "adapter", model, params)
    assert all(np.asarray(pair.b).any() for pair in adapter["layers"].values()), "nothing was learned"
    # What full fine-tuning would send counts the model's own parameters, however few bits hold them.
    facts = json.loads((folder / "config.json").read_text())["federation"]["communication"]
    full = safetensors.numpy.load_file(tmp_path / "base" / "model.safetensors")
    own = sum(v.size for k, v in full.items() if k != "lm_head.weight") + tensors["base_model.model.score.weight"].size
    assert facts["full_parameters"] == own


def test_mixed_numbers_learn_what_wide_ones_do_on_any_cpu(finance_table, tmp_path, monkeypatch):
    learned = {}
    for name, dtype, native in (
        ("wide", "float32", True),
        ("narrow", "mixed", True),
        ("widened", "mixed", False),
    ):
        monkeypatch.setattr(products, "cpu_multiplies_bfloat16", lambda native=native: native)
        (tmp_path / name).mkdir()
        flags = (f"--dtype={dtype}", "--last_layers=1", "--seed=1", "--noise_multiplier=none", "--epsilon=inf")
        fit(job("variants/gpt2_untied", finance_table, tmp_path / name, *flags))
        learned[name] = adapter_of(tmp_path / name / "run")
    for name in ("narrow", "widened"):
        for part, value in learned["wide"].items():
            off = np.abs(learned[name][part] - value).max()
            assert off < 0.1 * np.abs(value).max(), (name, part)
    assert any((learned["narrow"][part] != learned["widened"][part]).any() for part in learned["wide"])


@pytest.mark.parametrize(
    ("base", "extra", "sentence"),
    [
        ("chatglm2_tiny", (), "has no classifier here"),
        ("variants/gpt2_untied", ("--dtype=float8",), "--dtype=float8 is not known"),
        ("variants/gpt2_untied", ("--quantize=int3",), "--quantize=int3 is not known"),
        ("variants/gpt2_untied", ("--quantize=int8", "--dtype=mixed"), "use --dtype=bfloat16 or float32"),
        ("variants/gpt2_untied", ("--targets=query",), "unknown target 'query'"),
    ],
)
def test_what_a_model_cannot_do_is_one_sentence(base, extra, sentence, finance_table, tmp_path, capsys):
    assert run.main(job(base, finance_table, tmp_path, *extra)) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
