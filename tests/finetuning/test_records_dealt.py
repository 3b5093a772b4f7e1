"""From flags to each client's records."""

from dplora_jax.config import RunConfig, replace
from dplora_jax.data import partition
from dplora_jax.finetuning import dealing


def config(folder, **flags):
    return replace(
        RunConfig(),
        dataset="csv",
        data_dir=str(folder),
        text_column="text",
        label_column="label",
        labels=("good", "bad"),
        **flags,
    )


def test_the_flags_say_how_a_table_is_written(tmp_path):
    (tmp_path / "train.csv").write_bytes("text;label\ncafé, noir;good\nthé;bad\n".encode("cp1252"))
    (tmp_path / "test.csv").write_text("text,label\ndéjà,good\n")
    corpus, shares = dealing.load(config(tmp_path, encoding="cp1252", separator="semicolon", clients=2))
    assert corpus.train.texts == ("café, noir", "thé")
    assert corpus.test.texts == ("déjà",)
    assert sorted(share.tolist() for share in shares) == [[0], [1]]


def test_clients_in_folders_have_the_rows_of_their_own_tables_alone(tmp_path):
    """A name like bank? would be its neighbours' too, were it a pattern."""
    sizes = {"bank1": 3, "bank2": 4, "bank?": 2, "bank[12]": 1}
    for name, rows in sizes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.csv").write_text("text,label\n" + "".join(f"{name} {i},good\n" for i in range(rows)))
    corpus, shares = dealing.load(config(tmp_path, partition=partition.FOLDERS, clients=4, eval_every=0))
    assert [len(share) for share in shares] == [sizes[name] for name in sorted(sizes)]
    assert len(set(corpus.train.texts)) == len(corpus.train.texts) == sum(sizes.values())
