"""Language models through the main job: answers, text and label words, and the public tasks beside them."""

import functools
import json
import math
import shutil
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import models, peft
from dplora_jax.finetuning import setup
from experiments import cli as run_flags
from experiments import ledger, run
from experiments.attacks import audit, membership
from tests.conftest import GOLDEN, WORDS, write_tokenizer
from tests.experiments.small_runs import fit

pytestmark = pytest.mark.usefixtures("quick_compile")
NOUNS, VERBS = WORDS[5:9], WORDS[9:13]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A golden Llama of two layers with the tiny tokenizer beside it."""
    place = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(GOLDEN / "variants/llama_mqa", place)
    write_tokenizer(place)
    return place


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Folders `answers`, `text`, `labels` of 60 and 12 records, and `piqa` of eight choices."""
    root, rng = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    for name, count in (("train", 60), ("test", 12)):
        found = [(NOUNS[rng.integers(4)], VERBS[rng.integers(4)], WORDS[rng.integers(13, 20)]) for _ in range(count)]
        lines(root / "answers" / f"{name}.jsonl", [{"q": f"{n} {w}", "a": f"{n} {v} again"} for n, v, w in found])
        lines(root / "text" / f"{name}.jsonl", [{"words": " ".join(three)} for three in found])
        lines(root / "labels" / f"{name}.jsonl", [{"words": f"{n} {w}", "way": v} for n, v, w in found])
    rows = [{"goal": n, "sol1": "rose today again", "sol2": "fell", "label": i % 2} for i, n in enumerate(NOUNS * 2)]
    lines(root / "public" / "piqa" / "validation.jsonl", rows)
    return root


def job(base, folder, workdir, *more):
    return [
        f"--model={base}", "--dataset=jsonl", f"--data_dir={folder}", "--max_length=12", "--clients=2", "--rounds=2",
        "--expected_batch_size=12", "--rank=2", "--epsilon=8", "--delta=1e-3", "--client_lr=0.1", "--eval_every=1",
        "--generate=5", "--new_tokens=4", f"--workdir={workdir}", *more,
    ]  # fmt: skip


KINDS = {
    "answers": ("--prompt_column=q", "--answer_column=a"),
    "text": ("--text_column=words",),
    "labels": ("--text_column=words", "--label_column=way", f"--labels={','.join(VERBS)}"),
}


@pytest.fixture(scope="module")
def done(base, tables, tmp_path_factory):
    """`done(kind)`: the workdir of a finished run of that kind, the layer below the last run once."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def of(kind):
        if kind not in made:
            more = ["--seed=1", f"--benchmarks_dir={tables / 'public'}", "--benchmarks=piqa", "--last_layers=1"]
            fit(job(base, tables / kind, root / kind, *KINDS[kind], *more))
            made[kind] = root / kind
        return made[kind]

    return of


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


OWN = {"answers": {"perplexity"}, "text": {"perplexity"}, "labels": {"accuracy", "macro_f1"}}
ENDS = {"answers": {"token_f1", "rouge_l"}, "text": set(), "labels": set()}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_metrics_and_longer_ones_at_both_ends_alone(kind, done):
    own, ends = OWN[kind], ENDS[kind] | {"piqa_accuracy", "piqa_accuracy_norm"}
    first, middle, last = metrics(done(kind))
    everything = set.union(*OWN.values(), *ENDS.values(), ends)
    assert first.keys() & everything == last.keys() & everything == own | ends
    assert middle.keys() & everything == own
    assert all(math.isfinite(last[name]) for name in own | ends)
    assert ledger.main(["verify", str(done(kind))]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_a_causal_language_models_in_pefts_format_and_not_the_fresh_one(kind, base, done):
    folder = done(kind) / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    model, params = models.from_pretrained(base)
    adapter, _ = peft.load(folder, model, params)
    assert all(np.asarray(pair.b).any() for pair in adapter["layers"].values())


@functools.cache
def loaded(base, workdir):
    """(tokenizer, function of token ids that gives the logits of the whole model) of a finished run, or of the base."""
    model, params = models.from_pretrained(base)
    adapter = peft.load(workdir / "adapter", model, params)[0] if workdir else None
    return models.load_tokenizer(base), jax.jit(lambda ids: model.apply(params, {"input_ids": ids}, adapter))


def log_likelihood(base, workdir, prompt, answer):
    """Of an answer's tokens, by logits of the whole model, and how many they are: the plain way."""
    tokenizer, logits_of = loaded(base, workdir)
    before = tokenizer(
        prompt
    ).input_ids  # the tiny tokenizer closes a prompt, even none, so the answer is tokenised apart
    ids = [*before, *tokenizer(answer, add_special_tokens=False).input_ids]
    start = len(before)
    nats = np.asarray(jax.nn.log_softmax(logits_of(jnp.array([ids]))[0]))[np.arange(len(ids) - 1), ids[1:]]
    return float(nats[start - 1 :].sum()), len(ids) - start


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["answers", "text"])
def test_perplexity_is_that_of_the_answers_tokens_alone(kind, base, tables, done):
    rows = read(tables / kind / "test.jsonl")
    asked = [(f"Question: {r['q']}\nAnswer:", f" {r['a']}") if kind == "answers" else ("", r["words"]) for r in rows]
    nats, tokens = np.sum([log_likelihood(base, done(kind), *pair) for pair in asked], axis=0)
    assert metrics(done(kind))[-1]["perplexity"] == pytest.approx(math.exp(-nats / tokens), rel=1e-4)


def words_of(base, workdir, row):
    """The log-probabilities of the labels' words, among them, behind a row's prompt: the plain way."""
    nats = [log_likelihood(base, workdir, f"{row['words']}\nLabel:", f" {verb}")[0] for verb in VERBS]
    return np.asarray(jax.nn.log_softmax(np.array(nats)))


def test_a_label_is_the_likeliest_word_less_how_likely_it_is_on_public_text(base, tables, done):
    rows = read(tables / "labels" / "test.jsonl")
    described = json.loads((done("labels") / "config.json").read_text())["federation"]
    bias = np.mean([words_of(base, None, row) for row in rows], 0)
    np.testing.assert_allclose(described["measured"]["bias"], bias, atol=1e-5)
    assert all(f"{verb} ({verb}) less" in described["label_reading"] for verb in VERBS)
    assert described["label_reading"] in described["method"]
    assert "on the texts of the public test set, its labels unused" in described["label_reading"]
    best = [int(np.argmax(words_of(base, done("labels"), row) - bias)) for row in rows]
    right = np.mean([VERBS[index] == row["way"] for index, row in zip(best, rows, strict=True)])
    assert metrics(done("labels"))[-1]["accuracy"] == pytest.approx(right)


def test_choices_are_scored_plain_and_by_their_lengths(base, tables, done):
    rows = read(tables / "public" / "piqa" / "validation.jsonl")
    found = {"accuracy": [], "accuracy_norm": []}
    for row in rows:
        answers = (row["sol1"], row["sol2"])
        nats = [log_likelihood(base, done("text"), f"Question: {row['goal']}\nAnswer:", f" {a}")[0] for a in answers]
        found["accuracy"].append(np.argmax(nats) == row["label"])
        found["accuracy_norm"].append(
            np.argmax([n / len(a) for n, a in zip(nats, answers, strict=True)]) == row["label"]
        )
    last = metrics(done("text"))[-1]
    assert {name: last[f"piqa_{name}"] for name in found} == {name: np.mean(hits) for name, hits in found.items()}
    assert found["accuracy"] != found["accuracy_norm"]


def test_layers_that_run_once_for_each_record_change_nothing(base, tables, done, tmp_path):
    flags = ["--seed=1", "--last_layers=1", "--nocache_frozen"]
    fit(job(base, tables / "answers", tmp_path / "whole", *KINDS["answers"], *flags))
    for one, other in zip(metrics(done("answers")), metrics(tmp_path / "whole"), strict=True):
        assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)


@pytest.mark.slow
def test_labels_words_learn_what_their_texts_say(base, tables, tmp_path):
    """Without noise, the answer to the noun is the verb that always follows it."""
    rows = [{"words": noun, "way": verb} for noun, verb in zip(NOUNS, VERBS, strict=True)]
    for name in ("train", "test"):
        lines(tmp_path / "own" / f"{name}.jsonl", [*rows, rows[0] | {"words": f"{NOUNS[0]} {name}"}] * 4)
    more = ["--epsilon=inf", "--rounds=40", "--eval_every=40", "--targets=all-linear", "--client_lr=2", "--rank=8"]
    more += ["--expected_batch_size=10", "--server_momentum=0.5"]
    fit(job(base, tmp_path / "own", tmp_path / "run", *KINDS["labels"], *more))
    assert metrics(tmp_path / "run")[-1]["accuracy"] > 0.9


@pytest.mark.slow
def test_the_claim_of_a_language_model_is_audited_on_its_own_loss(base, tables, tmp_path):
    more = ["--runs=4", "--canaries=4", "--audit_seed=1"]
    assert audit.main(job(base, tables / "text", tmp_path / "audit", *KINDS["text"], *more)) == 0
    (found,) = json.loads((tmp_path / "audit" / "audit.json").read_text())["audits"]
    assert 0 <= found["guesses"] <= found["claim"]
    assert found["coins"] == 4 * 2 * 4 * 3 // 4


@pytest.mark.slow
def test_membership_is_inferred_of_answers_too(base, tables, tmp_path):
    config = run_flags.parse(job(base, tables / "answers", tmp_path, *KINDS["answers"]))
    found = membership.attack(config, seed=3)
    assert (found["members"], found["others"]) == (60, 12)


@pytest.mark.parametrize(
    ("kind", "more", "sentence"),
    [
        ("text", ("--objective=classifier",), "has no labels to classify by"),
        ("answers", ("--head_only",), "has no labels to classify by"),
        ("text", ("--chat",), "--chat needs prompts"),
        ("answers", ("--chat",), "no chat template"),
        ("labels", ("--max_length=3",), "leaves no room for a text"),
        ("labels", ("--objective=language_model", "--head_only"), "no --head_only"),
        ("answers", ("--new_tokens=5000",), "together exceed the model's"),
        ("text", ("--benchmarks=nothing",), "benchmark 'nothing' is unknown"),
        ("labels", ("--objective=classifier", "--benchmarks=piqa"), "needs a language model"),
        ("text", ("--parties=1",), "--parties=1 must be at least"),
        ("text", ("--objective=words",), "--objective=words is not known"),
    ],
)
def test_what_does_not_fit_is_one_sentence(kind, more, sentence, base, tables, tmp_path, capsys):
    assert run.main(job(base, tables / kind, tmp_path, *KINDS[kind], *more)) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_a_benchmark_that_is_the_training_table_is_refused_and_ones_own_task_is_its_test_set(
    base, tables, tmp_path, capsys
):
    """Metrics on the training records would be exact statistics of what is private."""
    rows = [{"question": f"{noun} {verb}", "answer": f"{verb} again"} for noun in NOUNS for verb in VERBS]
    lines(tmp_path / "public" / "medquad" / "train.jsonl", rows)
    flags = ["--dataset=medquad", "--test_fraction=0.25", "--rounds=1", "--generate=0"]
    more = [*flags, "--benchmarks=medquad", f"--benchmarks_dir={tmp_path / 'public'}"]
    fit(job(base, tmp_path / "public" / "medquad", tmp_path / "own", *more))
    last = metrics(tmp_path / "own")[-1]
    assert last["medquad_perplexity"] == pytest.approx(last["perplexity"], rel=1e-5)
    lines(tmp_path / "mine" / "train.jsonl", rows)
    lines(tmp_path / "held.jsonl", rows[:2])
    own = ["--prompt_column=question", "--answer_column=answer", f"--test_data={tmp_path / 'held.jsonl'}"]
    more = [*own, "--benchmarks=medquad", f"--benchmarks_dir={tmp_path / 'public'}"]
    assert run.main(job(base, tmp_path / "mine", tmp_path / "copy", *more)) == 2
    assert "--benchmarks=medquad is refused as a public test set" in capsys.readouterr().err
    (tmp_path / "mine").rename(tmp_path / "medquad")
    more = [*own, "--benchmarks=medquad", f"--benchmarks_dir={tmp_path}"]
    assert run.main(job(base, tmp_path / "medquad", tmp_path / "same", *more)) == 2
    assert "where the private table lies" in capsys.readouterr().err
    lines(tmp_path / "wards" / "north" / "train.jsonl", rows)
    lines(tmp_path / "wards" / "south" / "train.jsonl", [{"question": "who?", "answer": "she"}] * 20)
    more = [
        *own,
        "--partition=folders",
        "--clients=2",
        "--benchmarks=medquad",
        f"--benchmarks_dir={tmp_path / 'public'}",
    ]
    assert run.main(job(base, tmp_path / "wards", tmp_path / "folders", *more)) == 2
    assert "--benchmarks=medquad is refused as a public test set" in capsys.readouterr().err
    more = [*own, "--benchmarks=boolq", f"--benchmarks_dir={tmp_path / 'public'}"]
    assert run.main(job(base, tmp_path / "medquad", tmp_path / "none", *more)) == 2
    assert f"needs the folder {tmp_path / 'public' / 'boolq'}, which does not exist" in capsys.readouterr().err


def test_a_test_set_with_all_records_of_a_client_is_refused(base, tmp_path, capsys):
    rows = [{"question": f"{n} {v}", "answer": f"{v} again", "ward": n} for n in NOUNS for v in (*VERBS, *WORDS[13:18])]
    lines(tmp_path / "all" / "train.jsonl", rows)
    lines(tmp_path / "all" / "test.jsonl", [row for row in rows if row["ward"] == NOUNS[1]])
    own = ["--prompt_column=question", "--answer_column=answer", "--partition=column:ward", "--clients=4"]
    assert run.main(job(base, tmp_path / "all", tmp_path / "run", *own)) == 2
    said, reason = capsys.readouterr(), tmp_path / "run" / "private" / "refused.json"
    assert "the test table is refused as a public test set" in said.err
    assert str(reason) in said.err
    assert "record of a client" not in said.out + said.err, "whoever supplied the table learns whose records it holds"
    assert "holds every training record of a client" in json.loads(reason.read_text())["reason"]
    assert [stat.S_IMODE(p.stat().st_mode) for p in (reason, reason.parent)] == [0o600, 0o700]


def test_bert_predicts_no_next_token(tiny_bert, tables, tmp_path, capsys):
    assert run.main(job(tiny_bert, tables / "answers", tmp_path, *KINDS["answers"])) == 2
    assert "has no labels" in capsys.readouterr().err
    assert run.main(job(tiny_bert, tables / "labels", tmp_path, *KINDS["labels"], "--objective=language_model")) == 2
    assert "reads from left to right" in capsys.readouterr().err


def test_one_party_of_several_has_its_own_share_alone(base, tables, tmp_path):
    more = ["--clients=1", "--parties=3", "--rounds=1"]
    made = setup.prepare(run_flags.parse(job(base, tables / "text", tmp_path / "one", *KINDS["text"], *more)))
    assert [len(shard["input_ids"]) for shard in made.shards] == [20]
