"""Loading benchmarks from a stand-in of the hub on this machine, and from a hub that does not answer."""

import json
from pathlib import Path
from subprocess import CompletedProcess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dplora_jax.data.tasks import TASKS
from tests import hub_stand_in
from tests.hub_stand_in import UNREACHABLE, run_python


def stand_in(files_by_dataset: dict[str, dict[str, bytes]]):
    hubs = {TASKS[dataset].hub: files for dataset, files in files_by_dataset.items()}
    return hub_stand_in.stand_in("datasets", {hub.repository: (files, hub.revision) for hub, files in hubs.items()})


def load_in_process(dataset: str, home: Path, endpoint: str) -> CompletedProcess:
    code = f"""
    from dplora_jax.data.sources import Source, load
    corpus = load(Source({dataset!r}))
    print(len(corpus.train.texts), sorted(corpus.train.texts), len(corpus.test.texts), corpus.description)
    """
    return run_python(code, HF_HOME=home, HF_ENDPOINT=endpoint)


def test_hub_serves_plain_csv_files(tmp_path):
    table = b"text,label\none,0\ntwo,1\nthree,2\n"
    files = {"sent_train.csv": table, "sent_valid.csv": table.replace(b"one", b"four")}
    files |= {".gitattributes": b"", "README.md": b"# Sentiment\n"}
    with stand_in({"twitter_financial_news_sentiment": files}) as endpoint:
        done = load_in_process("twitter_financial_news_sentiment", tmp_path, endpoint)
    assert done.stdout.startswith("3 ['one', 'three', 'two'] 3 twitter_financial_news_sentiment"), done.stderr


@pytest.mark.parametrize("name", ["train/0000.parquet", "financial_phrasebank-train.parquet"])
def test_hub_serves_the_conversion_of_a_script_repository(tmp_path, name):
    table = [{"sentence": f"s{i}", "label": i % 3} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "x.parquet")
    content = (tmp_path / "x.parquet").read_bytes()
    files = {f"sentences_50agree/{name}": content, f"sentences_allagree/{name}": b"of no concern"}
    with stand_in({"financial_phrasebank": files}) as endpoint:
        done = load_in_process("financial_phrasebank", tmp_path / "home", endpoint)
    assert done.stdout.startswith("4 ["), done.stderr
    assert "refs/convert/parquet" in done.stdout


def test_unreachable_hub_is_one_sentence_that_names_the_ways_out(tmp_path):
    code = """
    from dplora_jax.data.sources import Source, load
    from dplora_jax.errors import InputError
    try:
        load(Source("financial_phrasebank"))
    except InputError as error:
        print(error)
    """
    done = run_python(code, HF_HOME=tmp_path, HF_ENDPOINT=UNREACHABLE)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    assert "`data_dir`" in done.stdout
    assert "dataset=finance_demo" in done.stdout


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
    "### Instruction:\n{}\n### Response:"
)
ASKED = {"message_id": "a", "parent_id": None, "user_id": "u", "text": "Hi?", "role": "prompter", "lang": "en"}
REPLY = {"message_id": "b", "parent_id": "a", "user_id": "v", "text": "Hello.", "role": "assistant", "lang": "en"}
SAID = "\nOverall, the sentiment of this news is"
# A row of each public task as the hub's table has it, and what its first prompt and right answer must be.
ROWS = {
    "financial_phrasebank": ({"sentence": "Profit rose.", "label": 2}, f"Profit rose.{SAID}", " positive"),
    "twitter_financial_news_sentiment": ({"text": "$XY falls", "label": 0}, f"$XY falls{SAID}", " bearish"),
    "fiqa_sa": ({"sentence": "Flat.", "sentiment_score": 0.05}, f"Flat.{SAID}", " neutral"),
    "nwgi": ({"news": "Up.", "label": "strong positive"}, f"Up.{SAID}", " positive"),
    "meddialog": ({"src": "It hurts.", "tgt": "Rest."}, "Question: It hurts.\nAnswer:", " Rest."),
    "medquad": ({"question": "Why?", "answer": "So."}, "Question: Why?\nAnswer:", " So."),
    "liveqa": (
        {"NIST_PARAPHRASE": "Why?", "REFERENCE_ANSWERS": [{"ANSWERID": "1", "ANSWER": "So."}, {"ANSWER": "No."}]},
        "Question: Why?\nAnswer:", " So.",
    ),
    "alpaca_gpt4": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "Below is"},
        ALPACA.format("Add. 1 and 2"), " 3",
    ),
    "fingpt_sentiment": (
        {"input": "Profit rose.", "output": "positive", "instruction": "What is the sentiment of this news?"},
        ALPACA.format("What is the sentiment of this news? Profit rose."), " positive",
    ),
    "medical_flashcards": (
        {"input": "Why?", "output": "So.", "instruction": "Answer this question truthfully"}, ALPACA.format("Why?"), " So.",
    ),
    "code_alpaca": ({"instruction": "Sort.", "input": "", "output": "sorted(x)"}, ALPACA.format("Sort."), " sorted(x)"),
    "oasst1": ([ASKED, *[REPLY] * 5], ALPACA.format("Hi?"), " Hello."),
    "aya": (
        {"inputs": "Wer?", "targets": "Du.", "language": "German", "language_code": "deu", "user_id": "u"},
        ALPACA.format("Wer?"), " Du.",
    ),
    "wikitext2": ({"text": " A line . \n"}, "", " A line . \n"),
    "slimpajama": ({"text": "A document."}, "", "A document."),
    "boolq": (
        {"passage": "Ice floats.", "question": "does ice float", "answer": True},
        "Ice floats.\nQuestion: does ice float?\nAnswer:", " yes",
    ),
    "piqa": ({"goal": "Sit", "sol1": "stand", "sol2": "chair", "label": 1}, "Question: Sit\nAnswer:", " chair"),
    "winogrande": (
        {"sentence": "The cup fell on the mat, so _ broke.", "option1": "the cup", "option2": "the mat", "answer": "1"},
        "The cup fell on the mat, so the cup", " broke.",
    ),
}  # fmt: skip


def test_every_public_task_with_a_place_on_the_hub_is_tried():
    assert set(ROWS) == {name for name, task in TASKS.items() if task.hub}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """{task: [rows, first prompt, its right answer]} as one process reads them all from a hub."""
    folder, tables = tmp_path_factory.mktemp("hub"), {}
    for name, (row, _, _) in ROWS.items():
        pq.write_table(pa.Table.from_pylist(row if isinstance(row, list) else [row] * 5), folder / "x.parquet")
        place = TASKS[name].hub.folder
        file = f"{place}/test/0000.parquet" if place else "data/test-00000-of-00001.parquet"
        tables[name] = {file: (folder / "x.parquet").read_bytes()}
    code = f"""
    import json
    from dplora_jax.data.sources import benchmark
    for name in {list(ROWS)}:
        asked = benchmark(name, None)
        first = asked[0]
        print(json.dumps([name, [len(asked), first.prompts[first.right], first.answers[first.right]]]))
    """
    with stand_in(tables) as endpoint:
        done = run_python(code, HF_HOME=folder / "home", HF_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("name", ROWS)
def test_the_hub_serves_every_public_task_in_its_own_columns(name, served):
    """From a stand-in of the hub: the repository, the branch and the folder that the task names, its columns and its words."""
    assert served[name] == [5, *ROWS[name][1:]]
