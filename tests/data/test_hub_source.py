"""Loading benchmarks from a stand-in of the hub on this machine, and from a hub that does not answer."""

import contextlib
import http.server
import json
import os
import subprocess
import sys
import textwrap
import threading
import urllib.parse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dplora_jax.data.sources import BENCHMARKS

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run_python(code: str, **env) -> subprocess.CompletedProcess:
    """Runs `code` in a fresh process, which reads the Hugging Face settings of `env`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=clean | {k: str(v) for k, v in env.items()},
        capture_output=True,
        text=True,
        timeout=120,
    )


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers the hub's questions about one repository, whose `files` are {path: content}."""

    files: dict[str, bytes]
    repo: str
    revision: str

    def send(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self):
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        api, raw = f"/api/datasets/{self.repo}", f"/datasets/{self.repo}/resolve/"
        for revision in (COMMIT, self.revision):
            if path == f"{api}/revision/{revision}":
                info = {"id": self.repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "siblings": []}
                return self.send(200, json.dumps(info).encode(), Content_Type="application/json")
            if path == f"{api}/paths-info/{revision}":
                wanted = urllib.parse.parse_qs(asked).get("paths", []) if "=" in asked else json.loads(asked)["paths"]
                return self.listing([name for name in self.files if name in wanted], wanted)
            if path.startswith(f"{api}/tree/{revision}"):
                return self.listing(
                    [name for name in self.files if name.startswith(path.split(revision)[1].strip("/"))]
                )
            name = path.removeprefix(f"{raw}{revision}/")
            if name in self.files:
                return self.send(200, self.files[name], ETag=f'"{name}"', X_Repo_Commit=COMMIT)
        code = "EntryNotFound" if path.startswith((raw, api + "/")) else "RepoNotFound"
        return self.send(404, X_Error_Code=code, X_Repo_Commit=COMMIT)

    do_GET = do_HEAD = do_POST = answer

    def listing(self, names, asked=()):
        entries = [{"type": "file", "path": n, "size": len(self.files[n]), "oid": "0" * 40} for n in names]
        parents = {str(p) for n in self.files for p in Path(n).parents} - {"."}
        entries += [
            {"type": "directory", "path": p, "oid": "0" * 40} for p in sorted(parents) if p in asked or not asked
        ]
        self.send(200, json.dumps(entries).encode(), Content_Type="application/json")

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def stand_in(dataset: str, files: dict[str, bytes]):
    bench = BENCHMARKS[dataset]
    handler = type("Hub", (Hub,), {"files": files, "repo": bench.hub_id, "revision": bench.hub_revision})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def load_in_process(dataset: str, home: Path, endpoint: str) -> subprocess.CompletedProcess:
    code = f"""
    from dplora_jax.data.sources import Source, load
    corpus = load(Source({dataset!r}))
    print(len(corpus.train.texts), sorted(corpus.train.texts), len(corpus.test.texts), corpus.description)
    """
    return run_python(code, HF_HOME=home, HF_ENDPOINT=endpoint)


def test_hub_serves_plain_csv_files(tmp_path):
    table = b"text,label\none,0\ntwo,1\nthree,2\n"
    files = {"sent_train.csv": table, "sent_valid.csv": table, ".gitattributes": b"", "README.md": b"# Sentiment\n"}
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
    done = run_python(code, HF_HOME=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    assert "--data_dir" in done.stdout
    assert "--dataset=finance_demo" in done.stdout
