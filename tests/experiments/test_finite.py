"""A run that cannot train stops before its budget is spent, and public facts alone decide it."""

import math
import shutil
import types

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dplora_jax import models
from dplora_jax.errors import InputError, NotFiniteError
from dplora_jax.federation import aggregation, dispatch, finite, round
from dplora_jax.federation.federation import Federation
from dplora_jax.finetuning import setup
from experiments import cli
from tests.experiments import small_runs
from tests.federation import small_federation

ADAPTER = {"layers": {"q": jnp.ones((2, 3))}, "head": {"kernel": jnp.ones(3)}}


def state(adapter=ADAPTER, **parts):
    return round.State(adapter, {"trace": ADAPTER, "count": jnp.int32(3)}, aggregation.average_init(adapter), **parts)


def line(number=4, **metrics):
    return {"round": number, "epsilon_max": 1.0, **metrics}


def test_what_is_finite_goes_on():
    finite.check(state(), [line(0, accuracy=0.0, macro_f1=0.0)])
    finite.check(state(), [line(0, perplexity="inf"), line(1, perplexity=50.0), line(2)])
    finite.check(state(), [line(0, perplexity=2.0), line(1, finished=2, dropped=[0])])
    finite.check(state(), [line(0), line(1, finished=0, dropped=[])])  # nobody was in that round


def test_a_metric_that_is_nan_of_a_part_of_the_clients_is_no_end():
    finite.check(state(), [line(accuracy="nan", accuracy_by_client=[0.5, "nan"], macro_f1="nan")])


@pytest.mark.parametrize(
    "metrics",
    [
        {"accuracy": math.nan, "macro_f1": math.nan},
        {"accuracy": "nan", "macro_f1": "nan"},  # as read from a checkpoint
        {"accuracy": "nan", "accuracy_by_client": ["nan", "nan"]},
        {"perplexity": math.inf, "token_f1": 0.0, "rouge_l": 0.0},  # of text that is written from no numbers
    ],
)
def test_no_finite_metric_is_the_end_with_a_code_of_its_own(metrics):
    with pytest.raises(NotFiniteError, match="after round 4") as caught:
        finite.check(state(), [line(0, accuracy=0.5), line(4, **metrics), line(5)])
    assert caught.value.code == 65
    with pytest.raises(InputError, match="before any training") as caught:
        finite.check(state(), [line(0, **metrics)])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "parts",
    [
        {"adapter": {"layers": {"q": jnp.full((2, 3), jnp.nan)}, "head": {"kernel": jnp.ones(3)}}},
        {"adapter": {"layers": {"q": jnp.ones((2, 3))}, "head": {"kernel": jnp.array([1, jnp.inf, 1])}}},
        {"own": {"q": jnp.array([jnp.nan])}},
        {"residual": {"q": jnp.array([-jnp.inf])}},
        {"clip_norms": jnp.array([1.0, jnp.nan])},
    ],
)
def test_a_released_number_that_is_not_finite_is_the_end_without_any_evaluation(parts):
    with pytest.raises(NotFiniteError, match="not finite after round 2"):
        finite.check(state(**parts), [line(0), line(1), line(2)])


def test_a_round_that_dropped_every_upload_is_the_end():
    with pytest.raises(NotFiniteError, match="no client's upload of round 3"):
        finite.check(state(), [line(0), line(3, finished=0, dropped=[0, 1])])


def test_a_weight_that_is_not_finite_is_named():
    good = {"embed": {"word": jnp.ones((3, 2))}, "layers": {"codes": jnp.ones(3, jnp.uint8)}}
    finite.check_weights("there", good)
    for bad in (np.nan, np.inf):
        params = good | {"head": {"bias": jnp.array([0, bad], jnp.bfloat16)}}
        with pytest.raises(InputError, match=r"^model=there: its weights head/bias"):
            finite.check_weights("there", params)


@pytest.mark.parametrize(
    ("done", "metrics", "kind"), [(0, {"accuracy": "nan"}, InputError), (2, {"perplexity": math.nan}, NotFiniteError)]
)
def test_nothing_is_charged_once_no_metric_is_finite(monkeypatch, done, metrics, kind):
    """Before the first charge, and, started again, before the next."""
    federation = begun(monkeypatch, done, **metrics)
    with pytest.raises(kind):
        list(federation._run(JOB, None, None, None, lambda: False, None))


JOB = types.SimpleNamespace(config=small_federation.config(), ledger=None)


def begun(monkeypatch, done, **metrics):
    """A federation after `done` rounds, the last with these `metrics`, which must not charge any more."""
    monkeypatch.setattr(dispatch, "check_past", lambda job: None)
    monkeypatch.setattr(dispatch, "agreed_charge", lambda *_: pytest.fail("charged"))
    monkeypatch.setattr(Federation, "_restored", lambda *_: (done, state(), [line(done, **metrics)]))
    return small_federation.federation()


def test_a_run_whose_last_evaluation_is_not_finite_does_not_end_as_done():
    federation = small_federation.federation()
    federation.history = [line(4)]
    with pytest.raises(NotFiniteError):
        list(federation._finish(JOB, state(), lambda state, number, ends: {"accuracy": math.nan}, None, None))


@pytest.mark.parametrize(("done", "kind"), [(0, InputError), (2, NotFiniteError)])
def test_without_a_test_set_a_public_sentence_decides_before_each_charge(monkeypatch, done, kind):
    """An adapter may be finite, and too large for any logit."""
    federation = begun(monkeypatch, done)
    with pytest.raises(kind, match="of a public sentence is finite"):
        list(federation._run(JOB, None, None, lambda state: {"accuracy": math.nan}, lambda: False, None))


def bert_with(tiny_bert, folder, change):
    """A copy of the tiny BERT whose tensors `change` has changed."""
    shutil.copytree(tiny_bert, folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def spoilt(name, value):
    def change(tensors):
        key = next(key for key in tensors if key.endswith(name))
        tensors[key] = np.full_like(tensors[key], value)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoilt("word_embeddings.weight", np.nan), "weights embed/word"),
        (spoilt("layer.1.output.dense.bias", np.inf), "weights layers/down/bias"),
    ],
)
def test_a_base_that_cannot_give_finite_logits_is_refused_before_there_is_a_ledger(
    tiny_bert, finance_table, tmp_path, change, words
):
    model = bert_with(tiny_bert, tmp_path / "model", change)
    words_of = small_runs.arguments(model, finance_table, tmp_path)
    with pytest.raises(InputError, match=words):
        setup.prepare(cli.parse([*words_of, "--eval_every=0"]))


def test_finite_weights_that_overflow_give_no_finite_metric_of_a_sentence(tiny_bert, finance_table, tmp_path):
    for change, is_nan in ((lambda tensors: None, False), (spoilt("embeddings.LayerNorm.weight", 1e30), True)):
        model = bert_with(tiny_bert, tmp_path / str(is_nan), change)
        words = small_runs.arguments(model, finance_table, tmp_path)
        job = setup.prepare(cli.parse([*words, "--eval_every=0", "--last_layers=1"]))
        job.federation.prepare(job.shards)
        assert {math.isnan(value) for value in job.federation.evaluate(job.probe).values()} == {is_nan}


def test_a_tokenizer_beyond_the_embeddings_is_refused_by_a_run(tiny_bert, finance_table, tmp_path):
    model = shutil.copytree(tiny_bert, tmp_path / "model")
    tokenizer = models.load_tokenizer(model)
    tokenizer.add_tokens(["remdesivir"])
    tokenizer.save_pretrained(model)
    with pytest.raises(InputError, match=r"the id 20 .* 20 rows"):
        setup.prepare(cli.parse(small_runs.arguments(model, finance_table, tmp_path)))
