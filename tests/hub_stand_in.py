"""A stand-in of the Hugging Face hub on this machine, for subprocesses that read its address from HF_ENDPOINT."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import textwrap
import threading
import urllib.parse
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNREACHABLE = "http://127.0.0.1:9"  # the discard port: nothing listens


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
    """Answers questions about repositories of `kind` "datasets" or "models": {name: (files {path: content}, revision)}."""

    kind: str
    repositories: dict[str, tuple[dict[str, bytes], str]]

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
        folder = "" if self.kind == "models" else f"/{self.kind}"
        names = [
            name for name in self.repositories if path.startswith((f"/api/{self.kind}/{name}/", f"{folder}/{name}/"))
        ]
        if not names:
            return self.send(404, X_Error_Code="RepoNotFound", X_Repo_Commit=COMMIT)
        repo = names[0]
        files, branch = self.repositories[repo]
        api, raw = f"/api/{self.kind}/{repo}", f"{folder}/{repo}/resolve/"
        for revision in (COMMIT, branch):
            if path == f"{api}/revision/{revision}":
                siblings = [{"rfilename": name} for name in files]
                info = {"id": repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
                body = json.dumps(info | {"siblings": siblings}).encode()
                return self.send(200, body, Content_Type="application/json")
            if path == f"{api}/paths-info/{revision}":
                wanted = urllib.parse.parse_qs(asked).get("paths", []) if "=" in asked else json.loads(asked)["paths"]
                return self.listing(files, [name for name in files if name in wanted], wanted)
            if path.startswith(f"{api}/tree/{revision}"):
                below = path.split(revision)[1].strip("/")
                return self.listing(files, [name for name in files if name.startswith(below)])
            name = path.removeprefix(f"{raw}{revision}/")
            if name in files:
                digest = hashlib.sha1(files[name]).hexdigest()
                return self.send(200, files[name], ETag=f'"{digest}"', X_Repo_Commit=COMMIT)
        code = "EntryNotFound" if path.startswith((raw, api + "/")) else "RepoNotFound"
        return self.send(404, X_Error_Code=code, X_Repo_Commit=COMMIT)

    do_GET = do_HEAD = do_POST = answer

    def listing(self, files, names, asked=()):
        entries = [{"type": "file", "path": n, "size": len(files[n]), "oid": "0" * 40} for n in names]
        parents = {str(p) for n in files for p in Path(n).parents} - {"."}
        entries += [
            {"type": "directory", "path": p, "oid": "0" * 40} for p in sorted(parents) if p in asked or not asked
        ]
        self.send(200, json.dumps(entries).encode(), Content_Type="application/json")

    def log_message(self, *args):
        pass


class Uploads(Hub):
    """Takes models from whoever has `token`: large files by git-lfs, and then a commit. `repositories` are filled, {name: {path:
    bytes}}, `visibility` {name: word} and `commits`, and so are `large` files {SHA-256: bytes}."""

    kind = "models"
    token: str

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if self.command == "PUT":
            self.large[path.removeprefix("/large/")] = body
            return self.send(200, ETag='"0"')
        if path == "/api/validate-yaml":
            return self.reply(self.validated(json.loads(body)["content"]))
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            return self.send(401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name not in self.repositories:
                self.repositories[name], self.visibility[name] = {}, asked["visibility"]
            return self.reply({"url": f"{self.address}/{name}"})
        name = next((name for name in self.repositories if f"/{name}" in path), None)
        if path == f"/api/models/{name}/preupload/main":
            mode = lambda path: "lfs" if path.endswith((".safetensors", ".gguf")) else "regular"  # noqa: E731
            modes = [{"path": p, "uploadMode": mode(p), "shouldIgnore": False} for p in self.paths(body)]
            return self.reply({"files": modes})
        if path == f"/{name}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{self.address}/large/{o['oid']}"}} for o in objects]
            return self.reply({"objects": [o | {"actions": a} for o, a in zip(objects, actions, strict=True)]})
        if path == f"/api/models/{name}/commit/main":
            self.repositories[name] |= dict(map(self.committed, body.splitlines()[1:]))
            self.commits.append(json.loads(body.splitlines()[0])["value"]["summary"])
            return self.reply({"commitUrl": f"{self.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        return self.send(404, X_Error_Code="RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def reply(self, document):
        self.send(
            400 if document.get("errors") else 200, json.dumps(document).encode(), Content_Type="application/json"
        )

    def validated(self, content):
        try:
            header = yaml.safe_load(content.split("---")[1])
            return {"errors": [] if isinstance(header, dict) else [{"message": "no header"}]}
        except yaml.YAMLError as error:
            return {"errors": [{"message": str(error)}]}

    def paths(self, body):
        return [file["path"] for file in json.loads(body)["files"]]

    def committed(self, line):
        """(path, content) of a line of a commit."""
        entry = json.loads(line)
        value = entry["value"]
        kinds = {"file": lambda: base64.b64decode(value["content"]), "lfsFile": lambda: self.large[value["oid"]]}
        return value["path"], kinds[entry["key"]]()


@contextlib.contextmanager
def taking_uploads(token: str):
    """A hub that takes models from whoever has `token`, for the length of the block: gives its handler's class and address."""
    state = {"repositories": {}, "visibility": {}, "commits": [], "large": {}}
    handler = type("Uploads", (Uploads,), {"token": token} | state)
    with _serving(handler) as address:
        yield handler, address


@contextlib.contextmanager
def stand_in(kind: str, repositories: dict[str, tuple[dict[str, bytes], str]]):
    """Serves {repository: (files, revision)} for the length of the block, and gives the address for HF_ENDPOINT."""
    with _serving(type("Hub", (Hub,), {"kind": kind, "repositories": repositories})) as address:
        yield address


@contextlib.contextmanager
def _serving(handler):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
