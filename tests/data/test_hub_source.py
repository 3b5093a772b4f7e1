"""Loading benchmarks from a stand-in of the hub on this machine, and from a hub that does not answer."""

from pathlib import Path
from subprocess import CompletedProcess

import hub_stand_in
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_stand_in import UNREACHABLE, run_python

from dplora_jax.data.sources import BENCHMARKS


def stand_in(dataset: str, files: dict[str, bytes]):
    bench = BENCHMARKS[dataset]
    return hub_stand_in.stand_in("datasets", bench.hub_id, files, bench.hub_revision)


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
    with stand_in("twitter_financial_news_sentiment", files) as endpoint:
        done = load_in_process("twitter_financial_news_sentiment", tmp_path, endpoint)
    assert done.stdout.startswith("3 ['one', 'three', 'two'] 3 twitter_financial_news_sentiment"), done.stderr


@pytest.mark.parametrize("name", ["train/0000.parquet", "financial_phrasebank-train.parquet"])
def test_hub_serves_the_conversion_of_a_script_repository(tmp_path, name):
    table = [{"sentence": f"s{i}", "label": i % 3} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "x.parquet")
    content = (tmp_path / "x.parquet").read_bytes()
    files = {f"sentences_50agree/{name}": content, f"sentences_allagree/{name}": b"of no concern"}
    with stand_in("financial_phrasebank", files) as endpoint:
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
    assert "--data_dir" in done.stdout
    assert "--dataset=finance_demo" in done.stdout
