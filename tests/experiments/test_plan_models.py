"""The models that a plan knows by name have their published sizes, and the papers' federations are programs of them."""

import jax
import jax.numpy as jnp
import pytest

from dplora_jax import lora
from dplora_jax.config import Base, replace
from dplora_jax.errors import InputError
from dplora_jax.federation import round
from experiments import cli
from experiments.plan import models as plan_models
from experiments.plan import program as plan_program


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("bert-base", 109_482_240),
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama2-70b", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
        ("smollm2-135m", 134_515_008),
        ("chatglm-6b", 6_173_286_400),
    ],
)
def test_named_models_have_their_published_sizes(name, parameters):
    classes = 2 if name == "bert-base" else None
    params = plan_models.build(Base(name), classes)[1]
    head = {"head"} & set(params)
    assert lora.count({part: value for part, value in params.items() if part not in head}) == parameters
    assert plan_models.default_task(name) == ("classification" if classes else "language_model")


# Numbers in the language model, as transformers' own class of that config.json has them.
PUBLISHED = {
    "roberta-base": 124_697_433, "roberta-large": 355_412_057, "xlm-roberta-base": 278_295_186, "distilbert-base": 66_985_530,
    "modernbert-base": 149_655_232, "modernbert-large": 395_881_664, "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496, "llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824, "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512, "qwen2.5-72b": 72_706_203_648, "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264, "gemma2-2b": 2_614_341_888, "gemma2-9b": 9_241_705_984, "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176, "gemma3-1b": 999_885_952, "phi3-mini": 3_821_079_552, "phi4": 14_659_507_200,
    "pythia-160m": 162_322_944, "pythia-410m": 405_334_016, "pythia-1.4b": 1_414_647_808, "pythia-6.9b": 6_857_302_016,
    "gpt-neox-20b": 20_554_567_680, "olmo2-1b": 1_484_916_736, "olmo2-7b": 7_298_617_344, "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_models_of_today_have_their_published_sizes(name):
    model, params = plan_models.build(Base(name), None)
    assert lora.count(params) == PUBLISHED[name]
    encoder = name.split("-")[0] in ("roberta", "xlm", "distilbert", "modernbert")
    assert plan_models.default_task(name) == ("classification" if encoder else "language_model")
    assert lora.resolve_targets(model, ("q", "v"))


def test_few_bits_are_planned_in_few_bits():
    plain, few = (plan_models.build(Base("gpt2", "bfloat16", kind, remat=True), None) for kind in (None, "nf4"))
    assert few[0].config.remat
    size = lambda params: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params["layers"]))  # noqa: E731
    assert size(few[1]) < 0.3 * size(plain[1])


def test_an_unknown_model_is_named():
    with pytest.raises(InputError, match="llama9"):
        plan_models.build(Base("llama9"), None)


@pytest.mark.parametrize(
    ("flagfile", "name", "task", "parameters"),
    [
        ("paper_bert_finance", "bert-base", "classification", 2 * 12 * 512 * (768 + 768) + 3 * 769),
        ("paper_gpt2_medical", "gpt2", "language_model", 12 * 512 * (768 + 2304)),
        ("paper_chatglm6b_general", "chatglm-6b", "language_model", 28 * 512 * (4096 + 12288)),
        ("paper_llama2_7b_finance", "llama2-7b", "language_model", 2 * 32 * 512 * (4096 + 4096)),
    ],
)
def test_the_papers_federations_are_programs_of_their_models_published_shapes(flagfile, name, task, parameters):
    """Their weights cannot be had everywhere; a whole round of each is traced, gradients and noise included."""
    config = replace(cli.parse([f"--flagfile={flagfile}.flags"]), model=name, mesh="1x1")
    made = plan_program.abstract(config, jax.devices()[:1], [100] * 5, task, 3)
    state = jax.eval_shape(round.make(made.federation, made.mesh), *made.arguments)[0]
    before = made.arguments[0].adapter
    assert jax.tree.map(jnp.shape, state.adapter) == jax.tree.map(jnp.shape, before)
    assert lora.count(state.adapter) == parameters
