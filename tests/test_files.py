"""Of a folder that someone else made, only its own files are opened, and their JSON is read within bounds."""

import errno
import hashlib
import json
import os
import sys

import pytest

from dplora_jax import files, json_files
from dplora_jax.errors import LONGEST, InputError, StorageError


def refusal(call, *args):
    """The one sentence with which `call` is refused."""
    with pytest.raises(InputError) as caught:
        call(*args)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < LONGEST + 100
    return sentence


@pytest.fixture
def folder(tmp_path):
    """A folder with a file and a subfolder, beside which lies a secret."""
    made = tmp_path / "model"
    (made / "1_Pooling").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "id_rsa").write_text("{}")
    return made


def test_its_own_files_are_found(folder):
    assert files.find(folder, "config.json") == folder / "config.json"
    assert files.inside(folder, "1_Pooling", "config.json") == folder / "1_Pooling" / "config.json"
    assert files.find(folder, "nothing.json") is None
    assert files.find(folder / "nothing", "config.json") is None
    assert files.find(folder, "config.json", "config.json") is None
    assert "nothing.json does not exist" in refusal(files.inside, folder, "nothing.json")


@pytest.mark.parametrize(
    "name",
    [
        "../secret/id_rsa", "..", ".", "", "/etc/passwd", "1_Pooling/config.json", "..\\secret", ".env", "a\0b", "config.json\n",
        "\x1b[2Jconfig.json", "\ud800", "n" * 256, 5, None, ["config.json"], {"a": 1},
    ],
)  # fmt: skip
def test_only_a_plain_name_is_looked_for(folder, name):
    assert "only a plain name" in refusal(files.find, folder, name)
    assert "only a plain name" in refusal(files.find, folder, "1_Pooling", name)
    if name != ["config.json"]:
        assert "only a plain name" in refusal(files.find, folder, name, "config.json")


def test_an_absolute_path_to_the_file_itself_is_no_plain_name(folder):
    assert "only a plain name" in refusal(files.find, folder, str(folder / "config.json"))


@pytest.mark.parametrize("target", ["../secret/id_rsa", "config.json", "../model/config.json"])
def test_a_link_is_not_followed(folder, target):
    (folder / "notes.json").symlink_to(target)
    assert "is a link" in refusal(files.find, folder, "notes.json")
    assert "is a link" in refusal(files.read_json, folder / "notes.json")


def test_a_folder_that_is_a_link_inside_is_not_followed(folder):
    (folder / "2_Dense").symlink_to("../secret")
    assert "is a link" in refusal(files.find, folder, "2_Dense", "id_rsa")


def test_the_folder_itself_may_be_a_link(folder, tmp_path):
    (tmp_path / "current").symlink_to("model")
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    for place in (tmp_path / "current", tmp_path / "elsewhere" / "current", tmp_path / "secret" / ".." / "current"):
        assert files.find(place, "config.json") == place / "config.json"
        assert files.read_json(place / "config.json") == {}


def test_links_that_lead_nowhere_or_to_themselves(folder):
    (folder / "gone.json").symlink_to("nothing")
    (folder / "loop.json").symlink_to("loop.json")
    assert files.find(folder, "gone.json") is None
    refusal(files.find, folder, "loop.json")


def test_what_is_no_file_is_not_opened(folder):
    (folder / "tokenizer.json").mkdir()
    os.mkfifo(folder / "vocab.txt")  # reading one waits for ever
    (folder / "zero.json").symlink_to("/dev/zero")
    assert "is not a file" in refusal(files.find, folder, "tokenizer.json")
    assert "is not a file" in refusal(files.read_json, folder / "vocab.txt")
    assert "is a link" in refusal(files.find, folder, "zero.json")


HASH, SHARED = "0" * 39 + "a", "ab" + "1" * 62


@pytest.fixture
def snapshot(tmp_path):
    """A model in the cache of huggingface_hub, shared blobs included."""
    place = tmp_path / "hub" / "models--some--model" / "snapshots" / "0123"
    blobs, shared = tmp_path / "hub" / "models--some--model" / "blobs", tmp_path / "hub" / "blobs" / "ab"
    for one in (place / "1_Pooling", blobs, shared):
        one.mkdir(parents=True)
    (blobs / HASH).write_text('{"a": 1}')
    (shared / SHARED).write_text('{"b": 2}')
    (blobs / ("f" * 64)).symlink_to(f"../../blobs/ab/{SHARED}")
    (place / "config.json").symlink_to(f"../../blobs/{HASH}")
    (place / "tokenizer.json").symlink_to(f"../../blobs/{'f' * 64}")
    (place / "1_Pooling" / "config.json").symlink_to(f"../../../blobs/{HASH}")
    return place


def test_the_hubs_own_links_are_followed(snapshot, tmp_path):
    (tmp_path / "linked").symlink_to(snapshot)
    for place in (snapshot, tmp_path / "linked"):
        assert files.read_json(place / "config.json") == {"a": 1}
        assert files.read_json(place / "tokenizer.json") == {"b": 2}
        assert files.read_json(files.inside(place, "1_Pooling", "config.json")) == {"a": 1}


def test_no_other_link_in_the_hubs_cache_is_followed(snapshot):
    blobs, secret = snapshot.parents[1] / "blobs", snapshot.parents[3] / "secret"
    secret.write_text("{}")
    (blobs / "token").write_text("{}")
    (blobs / ("e" * 40)).symlink_to(secret)
    other = snapshot.parents[2] / "models--other" / "blobs"
    other.mkdir(parents=True)
    (other / HASH).write_text("{}")
    for number, target in enumerate(
        (secret, blobs / "token", blobs / ("e" * 40), other / HASH, snapshot / "config.json", blobs / HASH)
    ):
        (snapshot / f"{number}.json").symlink_to(target)
        if target == blobs / HASH or target == snapshot / "config.json":  # both are its own blob in the end
            assert files.find(snapshot, f"{number}.json")
        else:
            assert "is a link" in refusal(files.find, snapshot, f"{number}.json")
    aside = snapshot.parents[3] / "snapshots" / "0123"  # not in a repository of the cache's
    (aside.parents[1] / "blobs").mkdir()
    aside.mkdir(parents=True)
    (aside.parents[1] / "blobs" / HASH).write_text("{}")
    (aside / "config.json").symlink_to(f"../../blobs/{HASH}")
    assert "is a link" in refusal(files.find, aside, "config.json")


DEEP = {"lists": b"[" * 100_000, "objects": b'{"a":' * 100_000, "closed": b'{"a":' + b"[" * 200 + b"]" * 200 + b"}"}
MALFORMED = {
    "no JSON": b"{", "no UTF-8": b'{"a": "\xff\xfe"}', "UTF-16": '{"a": 1}'.encode("utf-16"),
    "digits": b'{"a": ' + b"9" * 5000 + b"}", "list": b"[1]", "nothing": b"", "zeros": bytes(100), **DEEP,
}  # fmt: skip


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_malformed_json_is_one_sentence(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert "config.json" in refusal(files.read_json, tmp_path / "config.json")


def test_depth_is_bounded_whatever_the_interpreters_own_bound_is(tmp_path):
    path = tmp_path / "config.json"
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    try:
        path.write_bytes(b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}")
        assert "nested more than" in refusal(files.read_json, path)
    finally:
        sys.setrecursionlimit(limit)
    path.write_text(json.dumps({"a": {"b": [[{"c": []}]]}}))
    assert files.read_json(path) == {"a": {"b": [[{"c": []}]]}}


def test_size_is_bounded_before_anything_is_parsed(tmp_path):
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(10 << 30)  # takes no room on the disk
    assert "more than 64 MiB" in refusal(files.read_json, path)
    path.write_bytes(b'{"a": [' + b"[]," * (json_files.MOST_PARTS + 1) + b"[]]}")
    assert "lists" in refusal(files.read_json, path)


def test_a_digest_is_of_the_files_bytes_and_follows_their_change(tmp_path):
    path = tmp_path / "weights"
    for content in (b"one", b"other"):
        path.write_bytes(content)
        assert files.sha256(path) == hashlib.sha256(content).hexdigest()


def test_what_a_message_quotes_moves_no_cursor_and_has_an_end():
    said = str(InputError("a file \x1b[2J\r\n\x00\ud800\u202e is wrong: " + "x" * 10**6 + "; copy it again."))
    assert said.isprintable()
    assert "\\x1b[2J\\r\\n" in said
    assert len(said) < LONGEST + 100
    assert said.endswith("; copy it again.")
    assert str(InputError("naïve Ω 中文 fehlt.")) == "naïve Ω 中文 fehlt."


def test_a_lost_folder_is_no_fault_of_the_file(folder, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "config.json")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(StorageError, match=os.strerror(errno.ESTALE)):
        files.read_bytes(folder / "config.json")
    monkeypatch.setattr(type(folder), "resolve", refuse)
    with pytest.raises(StorageError, match=os.strerror(errno.ESTALE)):
        files.find(folder, "config.json")
