"""Clients' own tables in folders: who is whose, and what is refused."""

import pytest

from dplora_jax.data import folders, sources
from dplora_jax.errors import InputError


@pytest.fixture
def source(tmp_path):
    """`source(**flags)`: two clients' tables and a public test set."""
    for name, rows in (("birch", "up,good\ndown,bad"), ("alder", "high,good"), (".hidden", "no,bad")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.csv").write_text(f"words,mood\n{rows}\n")
    (tmp_path / "test.csv").write_text("words,mood\nlow,bad\nhigher,good\n")
    flags = {"dataset": "csv", "data_dir": str(tmp_path), "text_column": "words", "label_column": "mood"}
    return lambda **more: sources.Source(**flags | more)


def test_clients_are_the_folders_in_sorted_order_and_labels_are_the_public_ones(source):
    given = source()
    assert folders.names(given, 2) == ["alder", "birch"]
    corpus = sources.load_public(given, need_test=True)
    assert (corpus.train, corpus.label_names) == (None, ("bad", "good"))
    records = folders.read(given, corpus, "birch")
    assert (records.texts, records.labels.tolist()) == (("up", "down"), [1, 0])


def test_a_clients_folder_alone_is_opened(source, tmp_path):
    given = source()
    (tmp_path / "birch" / "train.csv").unlink()
    assert folders.read(given, sources.load_public(given, True), folders.names(given, 2)[0]).texts == ("high",)
    with pytest.raises(InputError, match=r"birch has no train\.csv"):
        folders.read(given, sources.load_public(given, True), "birch")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"dataset": "finance_demo"}, "dataset=finance_demo"),
        ({"data_dir": None}, "`data_dir`"),
        ({"text_column": None}, "`text_column`"),
        ({"test_fraction": 0.5}, "`test_fraction`"),
        ({}, "clients=2"),
    ],
)
def test_what_does_not_fit_folders_is_one_sentence(source, flags, said):
    with pytest.raises(InputError, match=said):
        folders.names(source(**flags), 3)


def test_a_clients_table_is_no_test_set(source, tmp_path):
    """Neither by its place, nor by holding all of its records."""
    with pytest.raises(InputError, match="private"):
        sources.load_public(source(test_data=str(tmp_path / "birch" / "train.csv")), True)
    (tmp_path / "copy.csv").write_text("words,mood\nlow,bad\nhigh,good\n")
    given = source(test_data=str(tmp_path / "copy.csv"))
    with pytest.raises(InputError, match="is refused as a public test set"):
        folders.read(given, sources.load_public(given, True), "alder")


@pytest.mark.parametrize("kind", ["symlink", "hard link", "linked folder"])
def test_one_file_is_not_two_clients(source, tmp_path, kind):
    """Its records would be trained on twice, and each client's epsilon be that of one."""
    own, other = tmp_path / "alder" / "train.csv", tmp_path / "birch" / "train.csv"
    if kind == "linked folder":
        other.unlink()
        other.parent.rmdir()
        other.parent.symlink_to(own.parent)
    else:
        other.unlink()
        other.symlink_to(own) if kind == "symlink" else other.hardlink_to(own)
    with pytest.raises(InputError, match=r"alder and .*birch hold one file"):
        folders.names(source(), 2)


def test_each_client_has_its_own_table_whatever_its_folder_is_called(tmp_path):
    clients = ["bank1", "bank2", "bank?", "bank[12]", "bank*", "{bank1,bank2}"]
    for name in clients:
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.csv").write_text(f'words,mood\n"of {name}",good\n')
    flags = {"text_column": "words", "label_column": "mood", "labels": ("good", "bad")}
    given = sources.Source("csv", str(tmp_path), **flags)
    corpus = sources.load_public(given, need_test=False)
    found = [folders.read(given, corpus, name).texts for name in folders.names(given, len(clients))]
    assert found == [(f"of {name}",) for name in sorted(clients)]


def test_a_folder_that_the_machine_refuses_is_one_sentence(source, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    given = source()
    corpus = sources.load_public(given, need_test=True)
    monkeypatch.setattr(sources.Path, "is_file", refuse)
    with pytest.raises(InputError, match=r"alder cannot be read \(Permission denied\)"):
        folders.read(given, corpus, "alder")
    assert folders.names(given, 2) == ["alder", "birch"]  # whose tables this process need not see
    monkeypatch.setattr(sources.Path, "iterdir", refuse)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        folders.names(given, 2)
